"""The measures of parity: each sees what it is for, and a broken number is never a pass."""

import numpy as np
import pytest

from zonda.runtime.metrics import (
    THRESHOLDS,
    Deviations,
    Verdict,
    deviations,
    kl_divergence,
    log_softmax,
    perplexity,
    relative_error,
    verdicts,
)

FLOAT32 = THRESHOLDS["float32"]


def logits(tokens: int = 5, vocabulary: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 5, (tokens, vocabulary)).astype(np.float32)


def test_equal_logits_deviate_in_nothing():
    want = logits()
    found = deviations(want, want.copy())
    assert found.cosine == pytest.approx(np.ones(5), abs=1e-15)
    assert found.norm_ratio.tolist() == [1.0] * 5
    assert found.max_error.tolist() == found.relative_error.tolist() == found.mean_error.tolist() == [0.0] * 5
    assert found.agrees.all()
    assert found.overlap.tolist() == [1.0] * 5
    assert found.scale == pytest.approx(np.abs(want).max(1))


def test_the_norm_ratio_sees_a_scale_that_the_cosine_does_not():
    want = logits()
    found = deviations(want, want * np.float32(1.5))
    assert found.cosine == pytest.approx(np.ones(5), abs=1e-7)
    assert found.norm_ratio == pytest.approx(np.full(5, 1.5), rel=1e-6)
    assert found.relative_error == pytest.approx(np.full(5, 0.5), rel=1e-6)


def test_errors_are_those_of_the_definition():
    want = np.array([[3.0, 0.0, 4.0]])
    found = deviations(want, np.array([[3.0, 1.0, 4.0]]))
    assert found.max_error.tolist() == [1.0]
    assert found.mean_error == pytest.approx([1 / 3])
    assert found.relative_error == pytest.approx([0.2])
    assert found.cosine == pytest.approx([25 / (5 * 26**0.5)])


def test_the_overlap_counts_common_first_choices():
    want = np.arange(30.0)[None]  # the ten largest are 20 … 29
    got = want.copy()
    got[0, [20, 21, 0, 1]] = [0, 1, 40, 41]
    assert deviations(want, got).overlap.tolist() == [0.8]


def test_another_choice_is_a_failure_unless_the_reference_holds_both_for_equal():
    scale = 10.0
    want = np.array([[10.0, 10.0 - 0.5 * FLOAT32.near_tie * scale, 0.0], [10.0, 9.99, 0.0], [10.0, 0.0, 0.0]])
    got = want[:, [1, 0, 2]]
    got[2] = want[2]
    assert verdicts(deviations(want, got), FLOAT32, scale) == [Verdict.AMBIGUOUS, Verdict.FAIL, Verdict.PASS]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_broken_number_fails(poison):
    want = logits()
    got = want.copy()
    got[2, 7] = poison
    judged = verdicts(deviations(want, got), FLOAT32, 20.0)
    assert judged[2] is Verdict.FAIL
    assert judged[:2] + judged[3:] == [Verdict.PASS] * 4


def test_deviations_join_in_order():
    want, got = logits(4), logits(4, seed=1)
    whole = deviations(want, got)
    joined = Deviations.join([deviations(want[:1], got[:1]), deviations(want[1:], got[1:])])
    for name in Deviations.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_zeros_are_equal_to_zeros_and_to_nothing_else():
    zeros, ones = np.zeros((1, 4)), np.ones((1, 4))
    same, other = deviations(zeros, zeros), deviations(zeros, ones)
    assert (same.cosine[0], same.norm_ratio[0], same.relative_error[0]) == (1, 1, 0)
    assert other.relative_error[0] == np.inf
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, ones) == np.inf


def test_relative_error_over_all_elements():
    assert relative_error(np.array([[3.0, 0], [0, 4]]), np.array([[3.0, 0], [0, 5]])) == pytest.approx(0.2)


def test_kl_divergence_of_two_coins():
    want = np.log(np.array([[0.5, 0.5]]))
    got = np.log(np.array([[0.25, 0.75]])) + 7  # a constant changes no probability
    assert kl_divergence(want, got) == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)])
    assert kl_divergence(want, want) == pytest.approx([0.0])


def test_log_softmax_does_not_overflow():
    found = log_softmax(np.array([[1000.0, 1000.0]], np.float32))
    assert found == pytest.approx(np.log([[0.5, 0.5]]))


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert perplexity(np.zeros((6, 32)), np.arange(6)) == pytest.approx(32)


def test_thresholds_grow_with_the_rounding():
    assert FLOAT32.max_error < THRESHOLDS["float16"].max_error < THRESHOLDS["bfloat16"].max_error < 0.2
