"""Golden data: exact while the full logits are there, and nearly as sharp from the digest that travels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from zonda import BundleError
from zonda.runtime.golden import BUCKETS, Golden, sketch

VOCABULARY = 400


def record(seed: int = 0) -> tuple[Golden, list[list[np.ndarray]]]:
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, length) for length in (2, 5)]
    logits = random.normal(0, 4, (7, VOCABULARY)).astype(np.float32)
    states = [[random.normal(0, 1, (2, len(p), 8)).astype(np.float32) for _ in range(4)] for p in prompts]
    return Golden.of(prompts, logits, states), states


def test_what_is_kept_of_the_logits_are_the_largest_in_order():
    golden, _ = record()
    order = np.argsort(-golden.logits, axis=1)[:, :16]
    np.testing.assert_array_equal(golden.top_ids, order)
    np.testing.assert_array_equal(golden.top_logits, np.take_along_axis(golden.logits, order, 1))
    assert golden.starts == [0, 2]
    assert golden.scale == np.abs(golden.logits).max()


def test_a_digest_survives_the_file_bit_for_bit(tmp_path):
    golden, _ = record()
    golden.digest().save(tmp_path / "golden.safetensors")
    read = Golden.read(tmp_path / "golden.safetensors")
    assert read.logits is None
    assert read.vocab_size == VOCABULARY
    for name in ("top_ids", "top_logits", "norms", "peaks", "sketches", "kv_norms", "kv_sketches"):
        np.testing.assert_array_equal(getattr(read, name), getattr(golden, name))
    for mine, theirs in zip(read.prompts, golden.prompts, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_digest_measures_what_the_logits_measure():
    golden, _ = record()
    tokens = np.arange(7)
    random = np.random.default_rng(1)
    got = golden.logits + random.normal(0, 1e-3, golden.logits.shape).astype(np.float32)
    exact, estimate = golden.compare_logits(tokens, got), golden.digest().compare_logits(tokens, got)
    assert estimate.relative_error == pytest.approx(exact.relative_error, rel=0.4)  # four standard errors
    assert estimate.relative_error.mean() == pytest.approx(exact.relative_error.mean(), rel=0.15)
    assert 1 - estimate.cosine == pytest.approx(1 - exact.cosine, rel=1.0)
    np.testing.assert_allclose(estimate.norm_ratio, exact.norm_ratio, rtol=1e-12)
    np.testing.assert_array_equal(estimate.agrees, exact.agrees)
    np.testing.assert_array_equal(estimate.overlap, exact.overlap)


def test_equal_logits_are_equal_to_the_digest_too():
    golden, _ = record()
    found = golden.digest().compare_logits(np.arange(7), golden.logits)
    assert found.relative_error.tolist() == found.max_error.tolist() == [0.0] * 7
    assert found.agrees.all()


def test_the_digest_knows_the_gap_to_another_choice():
    golden, _ = record()
    got = golden.logits.copy()
    runner_up = golden.top_ids[3, 1]
    got[3, runner_up] = 100
    found = golden.digest().compare_logits(np.arange(7), got)
    assert not found.agrees[3]
    assert found.gap[3] == pytest.approx(golden.top_logits[3, 0] - golden.top_logits[3, 1])
    got[3, golden.logits[3].argmin()] = 200  # not among those kept: no excuse
    assert np.isnan(golden.digest().compare_logits(np.arange(7), got).gap[3])


def test_states_are_held_to_their_sketch():
    golden, states = record()
    assert golden.compare_states(1, states[1]).tolist() == [0.0] * 4
    moved = [state.copy() for state in states[1]]
    moved[2] *= np.float32(1.01)
    assert golden.compare_states(1, moved) == pytest.approx([0, 0, 0.01, 0], rel=0.4, abs=1e-9)
    swapped = [states[1][0][::-1], *states[1][1:]]
    assert golden.compare_states(1, swapped)[0] > 0.5


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 3000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_sketch_is_linear_and_keeps_norms(seed, size):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, 1, size))
    both = sketch(a)[0].astype(np.float64) + sketch(b)[0]
    np.testing.assert_allclose(sketch(a + b)[0], both, atol=1e-5 * np.sqrt(size))
    ratio = np.linalg.norm(sketch(a)) / np.linalg.norm(a)
    assert 0.4 < ratio < 1.6


def test_one_changed_element_moves_the_sketch_by_exactly_that_much():
    zeros = np.zeros((1, 1000))
    for index in (0, 17, 999):
        moved = zeros.copy()
        moved[0, index] = 0.25
        assert np.abs(sketch(moved)).sum() == 0.25
        assert np.count_nonzero(sketch(moved)) == 1


def test_sketches_are_the_same_on_every_host():
    """Fixed by a hash of the index (SplitMix64, here in Python's integers), not by a library's random numbers."""
    mask = 2**64 - 1
    expected = np.zeros(BUCKETS)
    for index in range(1, 11):
        z = index * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        expected[z % BUCKETS] += -index if z >> 63 else index
    np.testing.assert_array_equal(sketch(np.arange(1.0, 11.0)[None])[0], expected)


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, save({"a": np.zeros(3)}), save({"a": np.zeros(3)}, {"format": "zonda-golden-1"})]
)
def test_what_is_no_golden_data_is_refused(tmp_path, data):
    (tmp_path / "golden.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="golden"):
        Golden.read(tmp_path / "golden.safetensors")
