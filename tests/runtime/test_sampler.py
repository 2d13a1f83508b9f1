"""The sampler against transformers' logits processors, a plain numpy reading of vLLM's order, and statistics."""

import tracemalloc

import numpy as np
import pytest
import torch
from support import normal_logits
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zonda import EngineError, RequestError
from zonda.runtime.sampler import SampledToken, Sampler, TokenLogprob, logprobs_of
from zonda.runtime.sampling import SamplingParams

SMOLLM2_VOCAB = 49152


def draws(params: SamplingParams, logits: np.ndarray, count: int, prompt=(0,)) -> np.ndarray:
    """How often each token came; penalties must be off, so that draws are independent."""
    sampler = Sampler(params, prompt, len(logits))
    tokens = [sampler.sample(logits).token_id for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits))


def expected_probabilities(params: SamplingParams, logits: np.ndarray) -> np.ndarray:
    """The distribution after transformers' own processors, in vLLM's order."""
    scores = torch.from_numpy(logits.copy())[None]
    warpers = [TemperatureLogitsWarper(float(params.temperature))]
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 9},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.02},
    {"min_p": 0.08},
    {"top_k": 20, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 500, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_frequencies_are_those_of_the_reference_distribution(options):
    """Six standard deviations of a binomial count, plus one draw: about 1e-9 a token if the sampler is right."""
    count, logits = 20_000, normal_logits(60)
    params = SamplingParams(seed=1, **options)
    expected = expected_probabilities(params, logits)
    found = draws(params, logits, count)
    assert not found[expected == 0].any()
    deviation = np.abs(found - count * expected)
    assert (deviation <= 6 * np.sqrt(count * expected * (1 - expected)) + 1).all()


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_exactly_the_tokens_that_the_reference_keeps_are_drawn(options):
    """Of a token with probability 0.04, 600 draws miss all with a chance of 0.96^600 = 2e-11."""
    for seed in range(25):
        logits = normal_logits(12, scale=1.5, seed=seed)
        params = SamplingParams(seed=seed, **options)
        expected = expected_probabilities(params, logits)
        found = draws(params, logits, 600) > 0
        assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
        assert found[expected >= 0.04].all()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"top_k": 900}, {"min_p": 0.001}], ids=str)
@pytest.mark.parametrize("vocab", [255, 256, 257, 1000])
def test_a_vocabulary_of_any_size_is_drawn_from_evenly(vocab, options):
    """Draws are summed in blocks: the share of each block-sized stretch, and of its ends, must be right."""
    count, logits = 4_000, normal_logits(vocab, scale=1.0)
    params = SamplingParams(seed=3, **options)
    expected, found = expected_probabilities(params, logits), draws(params, logits, count)
    assert not found[expected == 0].any()
    for stretch in (slice(0, 64), slice(64, 192), slice(192, 256), slice(256, 300), slice(300, 1000)):
        share = expected[stretch].sum()
        assert abs(found[stretch].sum() - count * share) <= 6 * np.sqrt(count * share * (1 - share)) + 1


def test_top_k_keeps_ties_with_the_kth():
    logits = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    assert np.flatnonzero(draws(SamplingParams(top_k=2, seed=0), logits, 400)).tolist() == [1, 2, 3, 4]


def test_top_p_keeps_the_lower_ids_of_ties():
    found = draws(SamplingParams(top_p=0.5, seed=0), np.zeros(8, np.float32), 800)
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]
    assert (abs(found[:4] - 200) < 6 * np.sqrt(800 * 0.25 * 0.75)).all()


def test_the_token_that_reaches_top_p_is_kept():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    assert np.flatnonzero(draws(SamplingParams(top_p=0.51, seed=0), logits, 400)).tolist() == [0, 1]
    assert np.flatnonzero(draws(SamplingParams(top_p=0.49, seed=0), logits, 400)).tolist() == [0]


def test_a_top_p_of_nearly_nothing_is_the_likeliest_token():
    logits = normal_logits(2000, scale=0.1)
    assert np.flatnonzero(draws(SamplingParams(top_p=1e-9, seed=0), logits, 50)).tolist() == [logits.argmax()]


def test_a_top_k_beyond_the_vocabulary_keeps_everything():
    logits = normal_logits(20)
    assert (
        draws(SamplingParams(top_k=10_000, seed=5), logits, 300).tolist()
        == draws(SamplingParams(seed=5), logits, 300).tolist()
    )


def test_tokens_of_probability_zero_are_never_drawn():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 700]] = 0.0
    for options in ({}, {"top_p": 0.999}, {"top_k": 500}, {"min_p": 0.5}):
        assert set(np.flatnonzero(draws(SamplingParams(seed=2, **options), logits, 200))) == {3, 700}


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_extreme_temperatures_are_the_limits_of_the_distribution(temperature):
    logits = np.array([0.0, 1.0, 2.0, -np.inf], np.float32)
    found = draws(SamplingParams(temperature=temperature, seed=0), logits, 300)
    assert np.flatnonzero(found).tolist() == ([2] if temperature < 1 else [0, 1, 2])


def edited_logits(params: SamplingParams, logits: np.ndarray, prompt: list[int], forced: list[int], **kwargs):
    """The logits after bias, suppression and penalties, seen by a processor that then forces the next token."""
    seen: list[np.ndarray] = []

    def force(generated, current):
        seen.append(current.copy())
        only = np.full_like(current, -np.inf)
        only[forced[len(generated)]] = 0.0
        return only

    sampler = Sampler(params.replace(logits_processors=[force]), prompt, len(logits), **kwargs)
    assert [sampler.sample(logits).token_id for _ in forced] == forced
    return seen


def vllm_like(params: SamplingParams, logits: np.ndarray, prompt: list[int], output: list[int], stops=()):
    """Bias and suppression, then repetition, frequency, presence: each token by itself, nothing clever."""
    result = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        result[token] += bias
    if len(output) < params.min_tokens:
        for token in stops:
            result[token] = -np.inf
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in set(output):
        result[token] -= params.frequency_penalty * output.count(token)
        result[token] -= params.presence_penalty
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 0.8},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 5.0, 7: -100.0}},
        {"min_tokens": 3},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": -0.3,
            "frequency_penalty": 0.4,
            "logit_bias": {4: 2.0},
            "min_tokens": 2,
        },
    ],
    ids=str,
)
def test_penalties_bias_and_minimum_length_equal_a_plain_reading_of_vllm(options):
    params, logits = SamplingParams(temperature=0.0, **options), normal_logits(16)
    prompt, forced, stops = [1, 4, 4, 9], [2, 4, 2, 2, 15, 1], [2, 15, 99]
    steps = edited_logits(params, logits, prompt, forced, stop_token_ids=stops)
    for step, found in enumerate(steps):
        expected = vllm_like(params, logits, prompt, forced[:step], [t for t in stops if t < 16])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers():
    logits, prompt, forced = normal_logits(16), [1, 4, 9], [2, 7, 2]
    steps = edited_logits(SamplingParams(temperature=0, repetition_penalty=1.4), logits, prompt, forced)
    for step, found in enumerate(steps):
        ids = torch.tensor([prompt + forced[:step]])
        expected = RepetitionPenaltyLogitsProcessor(1.4)(ids, torch.from_numpy(logits.copy())[None])[0]
        np.testing.assert_array_equal(found, expected.numpy())


def test_stop_tokens_are_free_again_after_the_minimum():
    logits = np.array([5.0, 1.0, 0.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), [1], 3, stop_token_ids=[0])
    assert [sampler.sample(logits).token_id for _ in range(4)] == [1, 1, 0, 0]


def test_processors_run_in_turn_before_temperature_and_filters():
    calls = []

    def shift_in_place(generated, logits):
        calls.append(("first", generated, logits.dtype, logits.shape))
        logits[0] = 50.0

    def swap(generated, logits):
        calls.append(("second", generated, float(logits[0])))
        return logits[::-1]

    params = SamplingParams(temperature=0.5, top_k=1, seed=0, logits_processors=[shift_in_place, swap])
    sampler = Sampler(params, [1], 5)
    assert [sampler.sample(normal_logits(5)).token_id for _ in range(2)] == [4, 4]
    assert calls[0] == ("first", (), np.dtype(np.float32), (5,))
    assert calls[1] == ("second", (), 50.0)
    assert calls[2][1] == (4,)


def test_a_processor_that_returns_the_wrong_shape_is_refused():
    params = SamplingParams(temperature=0, logits_processors=[lambda _, logits: logits[:3]])
    with pytest.raises(RequestError, match=r"shape \(3,\), not \(5,\)"):
        Sampler(params, [1], 5).sample(normal_logits(5))


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_options_that_leave_nothing_to_choose_are_told_from_a_broken_engine(value):
    params = SamplingParams(temperature=0, logits_processors=[lambda _, logits: np.full_like(logits, value)])
    with pytest.raises(RequestError, match=f"largest logit is {value}"):
        Sampler(params, [1], 5).sample(normal_logits(5))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0, "logit_bias": {1: 2.0}}, {"top_p": 0.5}])
@pytest.mark.parametrize("broken", ["all nan", "one nan", "inf", "all -inf"])
def test_logits_that_are_not_numbers_are_an_engine_error(options, broken):
    logits = normal_logits(40).copy()
    if broken.startswith("all"):
        logits[:] = np.nan if "nan" in broken else -np.inf
    else:
        logits[17] = np.nan if "nan" in broken else np.inf
    with pytest.raises(EngineError, match=r"largest logit is (nan|inf|-inf).*zonda verify"):
        Sampler(SamplingParams(**options), [1], 40).sample(logits)
    with pytest.raises(EngineError):
        logprobs_of(logits, 3, 2)


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(RequestError, match="token 40, outside the vocabulary of 40"):
        Sampler(SamplingParams(logit_bias={40: 1.0}), [1], 40)


def test_greedy_takes_the_first_of_equals():
    sampler = Sampler(SamplingParams(temperature=0), [1], 4)
    assert sampler.sample(np.array([0, 7, 7, 1], np.float32)) == SampledToken(1)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_logits_are_never_written_to(options):
    logits = normal_logits(300)
    before = logits.copy()
    sampler = Sampler(SamplingParams(logprobs=3, seed=0, **options), [1, 2], 300)
    for _ in range(5):
        sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


def tokens_of(seed: int | None, index: int = 0, count: int = 40) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed, top_p=0.95), [1], 500, index=index)
    return [sampler.sample(normal_logits(500, seed=step)).token_id for step in range(count)]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    assert tokens_of(7) == tokens_of(7)
    assert tokens_of(7) != tokens_of(8)
    assert tokens_of(None) != tokens_of(None)


def test_each_of_n_samples_has_a_stream_of_its_own():
    streams = [tuple(tokens_of(7, index)) for index in range(4)]
    assert len(set(streams)) == 4
    assert tuple(tokens_of(8, 0)) != streams[1]  # not seed + index
    assert streams == [tuple(tokens_of(7, index)) for index in range(4)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.3, "seed": 0},
        {"temperature": 0.7, "top_k": 5, "seed": 0, "repetition_penalty": 1.9, "logit_bias": {3: 9.0}},
    ],
    ids=str,
)
def test_logprobs_are_of_the_model_before_anything_was_changed(options):
    logits = normal_logits(50)
    exact = torch.log_softmax(torch.from_numpy(logits.copy()).double(), -1).numpy()
    order = np.argsort(-exact, kind="stable")
    sampler = Sampler(SamplingParams(logprobs=4, **options), [1, 2], 50)
    for _ in range(5):
        token = sampler.sample(logits)
        assert token.logprob == pytest.approx(exact[token.token_id], abs=1e-5)
        assert token.rank == order.tolist().index(token.token_id) + 1
        assert [t.token_id for t in token.top_logprobs] == order[:4].tolist()
        assert [t.rank for t in token.top_logprobs] == [1, 2, 3, 4]
        np.testing.assert_allclose([t.logprob for t in token.top_logprobs], exact[order[:4]], atol=1e-5)


def test_no_logprobs_are_computed_unless_asked_for_and_none_but_its_own_for_zero():
    logits = normal_logits(50)
    plain = Sampler(SamplingParams(temperature=0), [1], 50).sample(logits)
    assert (plain.logprob, plain.rank, plain.top_logprobs) == (None, None, ())
    own = Sampler(SamplingParams(temperature=0, logprobs=0), [1], 50).sample(logits)
    assert (own.rank, own.top_logprobs) == (1, ())
    assert own.logprob is not None


def test_ranks_of_equal_logits_follow_their_ids_in_list_and_token_alike():
    logits = np.array([1.0, 2.0, 1.0, 1.0, 0.0], np.float32)
    entry = logprobs_of(logits, 3, 3)
    assert [(t.token_id, t.rank) for t in entry.top_logprobs] == [(1, 1), (0, 2), (2, 3)]
    assert entry.rank == 4
    assert entry.top_logprobs[0] == TokenLogprob(1, entry.top_logprobs[0].logprob, 1)


def test_more_logprobs_than_tokens_are_all_of_them_and_impossible_ones_are_minus_infinity():
    logits = np.array([0.0, -np.inf, 0.0], np.float32)
    entry = logprobs_of(logits, 1, 20)
    assert [t.token_id for t in entry.top_logprobs] == [0, 2, 1]
    assert entry.logprob == -np.inf
    assert entry.top_logprobs[0].logprob == pytest.approx(np.log(0.5))


def test_large_logits_do_not_overflow():
    logits = np.array([3e38, 2e38, -3e38], np.float32)
    assert logprobs_of(logits, 0, 1).logprob == 0.0
    assert np.flatnonzero(draws(SamplingParams(seed=0), logits, 20)).tolist() == [0]


def test_a_greedy_step_allocates_nothing_of_the_size_of_the_vocabulary():
    logits = normal_logits(SMOLLM2_VOCAB).copy()  # writeable, as an engine's buffer is
    sampler = Sampler(SamplingParams(temperature=0), [1], SMOLLM2_VOCAB)
    sampler.sample(logits)
    tracemalloc.start()
    try:
        sampler.sample(logits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < SMOLLM2_VOCAB // 4  # a mask alone would take one byte a token
