"""Schedules cover every prompt, within the limits of any engine."""

from hypothesis import given
from hypothesis import strategies as st

from zonda.runtime.manifest import Limits
from zonda.runtime.schedules import quick_schedules, schedules

LENGTHS = st.lists(st.integers(1, 192), min_size=1, max_size=5).map(sorted)


def limits(max_batch: int = 8, max_chunk: int = 512) -> Limits:
    return Limits(capacity=256, max_batch=max_batch, max_chunk=max_chunk, vocab_size=100)


@given(lengths=LENGTHS, max_batch=st.integers(1, 6), max_chunk=st.integers(1, 256))
def test_every_row_gets_its_whole_prompt_and_no_step_breaks_a_limit(lengths, max_batch, max_chunk):
    for schedule in [*schedules(lengths, limits(max_batch, max_chunk)), *quick_schedules(lengths, limits(max_batch))]:
        assert schedule.first_row + len(schedule.rows) <= max_batch
        for place, row in enumerate(schedule.rows):
            assert sum(step[place] for step in schedule.steps) == lengths[row]
        for step in schedule.steps:
            assert len(step) == len(schedule.rows)
            assert any(step)
            assert 0 <= min(step) <= max(step)
    assert all(max(step) <= max_chunk for s in schedules(lengths, limits(max_batch, max_chunk)) for step in s.steps)


def test_all_prompts_are_prefilled_and_the_hard_cases_occur():
    plans = schedules([4, 27, 60, 167], limits())
    by_name = {}
    for plan in plans:
        by_name.setdefault(plan.name, []).append(plan)
    assert [plan.rows for plan in by_name["prefill"]] == [(0,), (1,), (2,), (3,)]
    assert len(by_name["chunked prefill"][0].steps) == 3
    assert set(by_name["decode"][0].steps) == {(1,)}
    (ragged,), (woven,) = by_name["ragged batch"], by_name["continuation with idle rows"]
    assert ragged.steps[0] == (1, 23, 56, 163)
    assert any(0 in step and max(step) > 1 for step in woven.steps), "a chunk beside an idle row"
    assert {plan.first_row for plan in plans} > {0}


def test_one_row_is_enough():
    plans = schedules([4, 27], limits(max_batch=1))
    assert {plan.name for plan in plans} == {"prefill", "chunked prefill", "decode", "continuation"}
