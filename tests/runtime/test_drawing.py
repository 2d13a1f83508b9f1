"""Drawing: the search for the likeliest tokens keeps what a full sort keeps, and rows together give what each gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import normal_logits

from zonda import EngineError
from zonda.runtime.sampler import Sampler, sample_rows
from zonda.runtime.sampling import SamplingParams

SMOLLM2_VOCAB = 49152


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.integers(2, 3000),
    k=st.integers(1, 40),
    levels=st.integers(1, 60),
    spacing=st.sampled_from([1e-7, 1e-3, 0.3, 1e30]),
    temperature=st.sampled_from([1e-5, 0.7, 1.0, 1e5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_of_a_large_vocabulary_keeps_what_a_full_sort_keeps(vocab, k, levels, spacing, temperature, seed):
    """Every token that is kept has a chance in 20,000 draws' worth of uniforms; with ties, at any spacing of values.

    The uniforms of the sampler are replaced by an even comb, so that each kept token that is not far less likely than
    the others is drawn, and no random miss is possible.
    """
    random = np.random.default_rng(seed)
    logits = (random.integers(0, levels, vocab) * spacing).astype(np.float32)
    logits[random.random(vocab) < 0.1] = -np.inf
    logits[random.integers(vocab)] = 0.0
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(temperature)
    kept = scaled >= np.sort(scaled)[-min(k, vocab)]
    weights = np.where(kept, np.exp(scaled, dtype=np.float64), 0.0)
    likely = weights > weights.sum() / 400
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=k), [0], vocab)
    sampler._uniforms = iter(np.linspace(0, 1, 1000, endpoint=False).tolist())
    found = {sampler.sample(logits).token_id for _ in range(1000)}
    assert found <= set(np.flatnonzero(kept))
    assert found >= set(np.flatnonzero(likely))


def test_what_temperature_makes_equal_to_the_kth_is_kept():
    """Two neighbouring floats whose quotients by 0.7 are one float: the lower id comes first, and both are kept."""
    neighbours = ((x, np.nextafter(x, np.float32(-8))) for x in -np.arange(6, 7, 2**-20, dtype=np.float32))
    higher, lower = next((a, b) for a, b in neighbours if a / np.float32(0.7) == b / np.float32(0.7))
    logits = np.full(3000, -100.0, np.float32)
    logits[[5, 17, 1700]] = 0.0, higher, lower
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=2), [0], 3000)
    weight = np.exp(float(higher) / 0.7)
    sampler._uniforms = iter([(1 + share * weight) / (1 + 2 * weight) for share in (-1, 0.5, 1.5)])
    assert [sampler.sample(logits).token_id for _ in range(3)] == [5, 17, 1700]


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"top_k": 40, "top_p": 0.9, "seed": 1},
    {"top_k": 40, "temperature": 0.7, "seed": 2, "logprobs": 2},
    {"top_k": 3, "seed": 3},
    {"top_p": 0.8, "seed": 4},
    {"seed": 5},
    {"min_p": 0.1, "seed": 6},
    {"top_k": 40, "seed": 7, "repetition_penalty": 1.3},
    {"top_k": 900, "seed": 8},
    {"top_k": 900, "seed": 9},
    {"temperature": 0.0, "logit_bias": {3: 5.0}},
]


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("vocab", [60, 3001, SMOLLM2_VOCAB])
def test_rows_of_a_batch_are_sampled_as_each_by_itself(order, vocab):
    """Shuffled kinds of sampling, alone and in runs, over some steps: the tokens and logprobs are equal, not close."""
    options = [MIXED[i] for i in np.random.default_rng(order).permutation(len(MIXED))]
    together, alone = ([Sampler(SamplingParams(**o), [1, 2], vocab) for o in options] for _ in range(2))
    for step in range(6):
        logits = np.stack([normal_logits(vocab, seed=100 * step + row).copy() for row in range(len(options))])
        found = sample_rows(together, logits)
        assert found == [sampler.sample(row.copy()) for sampler, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 5}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1234, 2999])
def test_a_broken_row_of_a_batch_is_an_engine_error(options, value, place):
    logits = np.stack([normal_logits(3000), normal_logits(3000), normal_logits(3000)])
    logits[1, place] = value
    with pytest.raises(EngineError, match="largest logit is"):
        sample_rows([Sampler(SamplingParams(**options), [1], 3000) for _ in logits], logits)
