"""SamplingParams: defaults, every range, every contradiction, and the two readers of mappings."""

import dataclasses
import math

import numpy as np
import pytest

from zonda import RequestError
from zonda.runtime.sampling import SamplingParams


def test_the_defaults_sample_from_the_model_s_own_distribution():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.n, params.seed) == (None, 0, 1, None)


def test_fields_are_by_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        SamplingParams(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3
    with pytest.raises((AttributeError, TypeError)):  # slots: no new names
        object.__setattr__(SamplingParams(), "top_q", 3)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        (name, bad)
        for name, values in {
            "temperature": [-0.1, math.nan, math.inf, "1", True, None, 1e-9, 1e6],
            "top_k": [-2, 1.0, "5", True, None],
            "top_p": [0, -0.1, 1.1, math.nan, True, None],
            "min_p": [-0.1, 1.1, math.nan, "0"],
            "repetition_penalty": [0, -1.0, math.inf, math.nan, 10**400],
            "presence_penalty": [-2.1, 2.1, math.nan, False],
            "frequency_penalty": [-2.1, 2.1, -math.inf],
            "logit_bias": [[1], 3, {"5": 1.0}, {-1: 1.0}, {True: 1.0}, {5: "x"}, {5: math.inf}, {5: 1e39}, None],
            "seed": [-1, 0.5, True, "7"],
            "stop": ["", [""], ["a", ""], [3], 3, None, b"x", [b"x"], {"a": 1}],
            "stop_token_ids": [[-1], ["5"], [True], 5, "55", None],
            "ignore_eos": [1, None, "true"],
            "max_tokens": [0, -1, 1.0, True],
            "min_tokens": [-1, 0.0, None],
            "n": [0, -1, True, 1.0],
            "logprobs": [-1, True, 1.5],
            "prompt_logprobs": [-1, False],
            "logits_processors": [[3], len, "x", None],
        }.items()
        for bad in values
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(name, bad):
    with pytest.raises(RequestError, match=name if name not in ("stop", "logits_processors") else "stop|processor"):
        SamplingParams(**{name: bad})


def test_every_field_is_checked_by_the_test_above():
    """A field that is added must be added there too."""
    marks = test_a_value_of_the_wrong_type_or_range_is_refused_by_name.pytestmark
    named = {name for name, _ in marks[0].args[1]}
    assert named == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": 2**63},
        {"top_p": 1e-9, "min_p": 1.0},
        {"logit_bias": {0: -100, 5: 3.5}},
        {"stop": "end", "stop_token_ids": {3, 4}},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"max_tokens": 5, "min_tokens": 5},
    ],
)
def test_values_at_the_edge_are_taken(good):
    SamplingParams(**good)


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        ({"temperature": 0, "top_k": 5}, "top_k"),
        ({"temperature": 0.0, "top_p": 0.9}, "top_p"),
        ({"temperature": 0, "min_p": 0.1, "top_p": 0.5}, "top_p, min_p"),
        ({"temperature": 0, "n": 2}, "n must be 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens 4 is more than max_tokens 3"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, culprits):
    with pytest.raises(RequestError, match=culprits):
        SamplingParams(**options)


def test_options_that_have_no_effect_do_not_contradict_greedy():
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=0)


def test_minus_one_turns_top_k_off_like_zero():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_what_the_caller_changes_later_changes_nothing():
    bias, stops, ids, processors = {1: 2.0}, ["a"], [3], [lambda *_: None]
    params = SamplingParams(logit_bias=bias, stop=stops, stop_token_ids=ids, logits_processors=processors)
    bias[1], stops[0], ids[0] = 9.0, "", -1
    processors.clear()
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({1: 2.0}, ("a",), (3,))
    assert len(params.logits_processors) == 1


def test_an_unknown_option_is_refused_with_the_nearest_known_name():
    with pytest.raises(RequestError, match=r"unknown sampling option 'max_token'; did you mean 'max_tokens'\?"):
        SamplingParams.from_dict({"max_token": 3})
    with pytest.raises(RequestError, match=r"unknown sampling option 'zzz'$"):
        SamplingParams.from_dict({"zzz": 3})
    with pytest.raises(RequestError, match="did you mean 'top_k'"):
        SamplingParams().replace(topk=3)


def test_a_mapping_of_known_options_is_the_same_as_keywords():
    options = {"temperature": 0.3, "top_k": 7, "stop": ["x"], "seed": 1}
    assert SamplingParams.from_dict(options) == SamplingParams(**options)


def test_a_changed_copy_is_checked_like_a_new_one():
    params = SamplingParams(temperature=0.5, top_k=3)
    assert params.replace(top_k=4) == SamplingParams(temperature=0.5, top_k=4)
    with pytest.raises(RequestError, match="greedy"):
        params.replace(temperature=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
        ),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": None, "eos_token_id": 2, "bos_token_id": 1, "transformers_version": "5"}, {}),
    ],
)
def test_a_generation_config_gives_the_defaults(config, expected):
    assert SamplingParams.from_generation_config(config) == SamplingParams(**expected)


def test_a_generation_config_that_is_wrong_is_named():
    with pytest.raises(RequestError, match=r"generation_config\.json: top_p"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})
