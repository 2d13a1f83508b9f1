"""The gate: an engine that computes what the reference computed passes every schedule; one that strays does not."""

import numpy as np
import pytest

from zonda import CapacityError, ParityError
from zonda.runtime.engines.memory import MemoryEngine
from zonda.runtime.golden import Golden
from zonda.runtime.manifest import Limits
from zonda.runtime.metrics import THRESHOLDS
from zonda.runtime.parity import prove

LIMITS = Limits(capacity=64, max_batch=4, max_chunk=16, vocab_size=120)
LENGTHS = (3, 12, 20, 41)


def golden_of_the_double() -> Golden:
    """What the engine double computes, without any schedule."""
    engine = MemoryEngine(LIMITS)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 120, length) for length in LENGTHS]
    logits = [engine.logits_after(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))]
    return Golden.of(prompts, np.stack(logits), [[p.astype(np.float64).reshape(1, -1, 1)] for p in prompts])


GOLDEN = golden_of_the_double()
FLOAT32 = THRESHOLDS["float32"]


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN.digest()], ids=["exact", "digest"])
def test_an_honest_engine_passes_and_the_report_counts_its_tokens(golden):
    seen = []
    parity = prove(MemoryEngine(LIMITS), golden, FLOAT32, progress=seen.append)
    assert parity.status == "passed"
    assert parity.max_logit == GOLDEN.scale
    tokens = {report.name: report.tokens for report in parity.schedules}
    everything = sum(LENGTHS)
    assert tokens == {
        "prefill": everything,
        "chunked prefill": 41,
        "decode": 12,
        "ragged batch": 4 + 4 * 4,  # the last token of the padded step, then those that come one by one
        "continuation with idle rows": everything,
    }
    assert list(dict.fromkeys(seen)) == list(tokens)
    for report in parity.schedules:
        assert (report.max_error, report.kv_error, report.top1_agreement, report.near_ties) == (0, 0, 1, 0)
        assert (report.mean_error is None) == (golden.logits is None)


def test_the_quick_proof_is_one_prompt_long_enough_for_a_prefill_graph():
    (report,) = prove(MemoryEngine(LIMITS), GOLDEN.digest(), FLOAT32, quick=True).schedules
    assert report.tokens == min(len(prompt) for prompt in GOLDEN.prompts if len(prompt) >= 24)


class Strayed(MemoryEngine):
    """A double with one fault."""

    def __init__(self, fault) -> None:
        super().__init__(LIMITS)
        self.fault = fault

    def step(self, cache, first_row, ids, offsets, lens, positions):
        logits = super().step(cache, first_row, ids, offsets, lens, positions)
        self.fault(cache, first_row, offsets, lens, logits)
        return logits


def scaled(cache, first_row, offsets, lens, logits):
    logits *= np.float32(1 + 1e-4)


def one_logit(cache, first_row, offsets, lens, logits):
    logits[..., 7] += np.float32(1e-3)


def in_decode_only(cache, first_row, offsets, lens, logits):
    if lens.max() == 1:
        logits += np.float32(1)


def beside_idle_rows_only(cache, first_row, offsets, lens, logits):
    if lens.min() == 0:
        logits[lens > 0] *= 2


def not_a_number(cache, first_row, offsets, lens, logits):
    logits[0, 0, 3] = np.nan


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN.digest()], ids=["exact", "digest"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (scaled, r"'prefill', step 0 \(3 new tokens\), prompt 0, token 0: .*norm of the logits is off by"),
        (one_logit, r"'prefill', step 0 .* the logits are off by"),
        (in_decode_only, r"'decode', step 0 \(1 new tokens\), prompt 1, token 0: .*"),
        (beside_idle_rows_only, r"'(ragged batch|continuation with idle rows)', step \d"),
        (not_a_number, r"'prefill', .*off by nan"),
    ],
)
def test_a_strayed_engine_is_caught_and_the_place_is_named(golden, fault, words):
    with pytest.raises(ParityError, match=words):
        prove(Strayed(fault), golden, FLOAT32)


def test_what_is_cached_is_held_too():
    """The token is changed after it was used: the logits of the step are right."""

    def forgetful(cache, first_row, offsets, lens, logits):
        if offsets[0] + lens[0] == 41:
            cache.tokens[first_row, 40] += 1

    with pytest.raises(ParityError, match=r"prompt 3: the keys that layer 0 cached are off by"):
        prove(Strayed(forgetful), GOLDEN, FLOAT32)


def test_a_near_tie_is_counted_and_passes():
    """Two logits that the reference holds for equal, one ulp apart in favour of the other."""
    logits = GOLDEN.logits.copy()
    best, second = GOLDEN.top_ids[0, :2]
    logits[0, second] = np.nextafter(logits[0, best], np.float32(0))
    golden = Golden.of(GOLDEN.prompts, logits, [[p.astype(np.float64).reshape(1, -1, 1)] for p in GOLDEN.prompts])

    def swap(cache, first_row, offsets, lens, found):
        if offsets[0] == 0 and cache.tokens[first_row, 0] == GOLDEN.prompts[0][0]:
            found[0, 0] = logits[0]
            found[0, 0, second] = np.nextafter(logits[0, best], np.float32(np.inf))

    parity = prove(Strayed(swap), golden, FLOAT32)
    assert sum(report.near_ties for report in parity.schedules) >= 1
    assert parity.schedules[0].top1_agreement < 1


def test_an_engine_opened_for_less_than_the_prompts_says_so():
    small = Limits(capacity=32, max_batch=4, max_chunk=16, vocab_size=120)
    with pytest.raises(CapacityError, match="capacity is 32"):
        prove(MemoryEngine(small), GOLDEN, FLOAT32)
