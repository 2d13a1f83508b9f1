import pytest

from benchmarks.plan import Case
from benchmarks.summary import METRICS, Run, Spread, compare, first_difference


def a_run(peer: str, number: int, *, decode_s: float = 1.0, prompt_tokens: int = 32, token_ids=(1, 2, 3)) -> Run:
    ids = (tuple(token_ids),)
    return Run(peer, number, Case(prompt_tokens), 0.01, 0.04, decode_s, len(ids[0]) - 1, ids, foreign_cores=0.0)


def test_metrics_follow_their_definitions():
    run = Run("zonda", 0, Case(32), 0.012, 0.04, 0.5, decoded_tokens=63, token_ids=((7,) * 64,), foreign_cores=0.0)
    assert METRICS["prefill_tokens_per_s"].of(run) == pytest.approx(32 / 0.04)
    assert METRICS["first_token_ms"].of(run) == pytest.approx(52)
    assert METRICS["decode_tokens_per_s"].of(run) == pytest.approx(63 / 0.5)  # the first token is prefill's


def test_in_a_batch_the_tokens_of_all_rows_count():
    run = Run("zonda", 0, Case(32, batch=4), 0.0, 0.1, 0.5, decoded_tokens=40, token_ids=((7,),) * 4, foreign_cores=0.0)
    assert METRICS["prefill_tokens_per_s"].of(run) == pytest.approx(4 * 32 / 0.1)
    assert METRICS["decode_tokens_per_s"].of(run) == pytest.approx(40 / 0.5)


def test_a_spread_has_the_median_not_the_mean():
    assert Spread.of([9.0, 1.0, 2.0]) == Spread(1.0, 2.0, 9.0)
    assert Spread.of([4.0, 1.0, 2.0, 3.0]).median == 2.5


def test_ratios_are_taken_within_rounds():
    # The machine is 10 times slower in round 1, for both; ours takes half the time in every round.
    runs = [a_run("zonda", 0, decode_s=1), a_run("genai", 0, decode_s=2)]
    runs += [a_run("genai", 1, decode_s=20), a_run("zonda", 1, decode_s=10)]
    _, genai = compare(runs, "zonda")
    assert genai.advantages["decode_tokens_per_s"] == Spread(2.0, 2.0, 2.0)


def test_an_advantage_above_one_favours_the_subject_also_where_less_is_better():
    ours = Run("zonda", 0, Case(32), 0.0, 0.05, 1.0, 1, ((1, 2),), 0.0)
    theirs = Run("genai", 0, Case(32), 0.05, 0.15, 1.0, 1, ((1, 2),), 0.0)
    _, genai = compare([ours, theirs], "zonda")
    assert genai.advantages["first_token_ms"].median == pytest.approx(4)
    assert genai.advantages["prefill_tokens_per_s"].median == pytest.approx(3)


def test_prompt_lengths_are_compared_apart_and_the_subject_not_with_itself():
    runs = [a_run(peer, 0, prompt_tokens=length) for length in (32, 512) for peer in ("zonda", "genai")]
    found = compare(runs, "zonda")
    assert [(one.case.prompt_tokens, one.peer) for one in found] == [
        (32, "zonda"),
        (32, "genai"),
        (512, "zonda"),
        (512, "genai"),
    ]
    assert [bool(one.advantages) for one in found] == [False, True, False, True]


def test_different_texts_are_counted_and_located():
    runs = [a_run("zonda", n, token_ids=[1, 2, 3, 4]) for n in range(3)]
    runs += [a_run("genai", 0, token_ids=[1, 2, 3, 4])]
    runs += [a_run("genai", 1, token_ids=[1, 2, 9, 4]), a_run("genai", 2, token_ids=[1, 2, 3, 9])]
    _, genai = compare(runs, "zonda")
    assert (genai.equal_texts, genai.texts, genai.first_difference) == (1, 3, 2)


def test_a_case_that_the_subject_cannot_run_has_figures_but_no_ratios():
    (genai,) = compare([a_run("genai", 0)], "zonda")
    assert genai.metrics["decode_tokens_per_s"].median == 2
    assert (genai.advantages, genai.texts) == ({}, 0)


@pytest.mark.parametrize(
    ("a", "b", "position"), [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)]
)
def test_first_difference(a, b, position):
    assert first_difference(a, b) == position
