import numpy as np
import pytest

from zonda import RequestError
from zonda.export.compare.steps import TOKENS, make_script, pseudo_random_prompts, tokens_for
from zonda.runtime.engines import check_step
from zonda.runtime.manifest import Limits


def limits(**changes) -> Limits:
    return Limits(**{"capacity": 128, "max_batch": 4, "max_chunk": 16, "vocab_size": 97} | changes)


@pytest.mark.parametrize(
    "given",
    [
        limits(),
        limits(max_chunk=128),
        limits(max_batch=1),
        limits(max_batch=2, max_chunk=1),
        limits(capacity=5, max_chunk=5),
        limits(capacity=1, max_batch=1, max_chunk=1),
    ],
    ids=str,
)
def test_every_step_obeys_the_contract_and_the_limits(given):
    script = make_script(pseudo_random_prompts(given.vocab_size), given)
    fed = np.zeros(script.rows, np.int32)
    for step in script.steps:
        assert (step.seqlen_offsets == fed).all()
        assert step.seqlen_offsets.max() + step.input_ids.shape[1] < script.capacity
        arguments = step.input_ids, step.seqlen_offsets, step.input_lens, step.logit_positions
        check_step(given, script.rows, 0, *arguments)
        fed = step.lengths
    assert fed.max() == min(TOKENS, given.capacity)


def test_the_script_has_ragged_idle_last_only_and_decode_steps():
    script = make_script(pseudo_random_prompts(97), limits(max_chunk=32))
    prefill, *_, last, decode = script.steps
    assert len(set(prefill.input_lens.tolist())) == 3
    assert any((step.input_lens == 0).any() for step in script.steps)
    assert last.logit_positions.tolist() == [[length - 1] for length in last.input_lens]
    assert decode.input_ids.shape == (3, 1)


def test_short_prompts_are_repeated_and_long_ones_cut():
    script = make_script([[5, 6], list(range(90))], limits(max_chunk=64), tokens=8)
    assert script.steps[0].input_ids[0, :4].tolist() == [5, 6, 5, 6]
    assert sum(int(step.input_lens[1]) for step in script.steps) == 6


def test_a_window_closes_within_the_script():
    assert tokens_for([]) == TOKENS
    assert tokens_for([100, 4096]) > 100


def test_empty_prompts_are_refused():
    with pytest.raises(RequestError, match="empty"):
        make_script([[], []], limits())
