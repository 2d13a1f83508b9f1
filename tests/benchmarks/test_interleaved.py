import sys
from pathlib import Path

import pytest

from benchmarks import BenchmarkError, interleaved
from benchmarks.interleaved import LeftOut, measure
from benchmarks.plan import Case, Plan, cases
from benchmarks.starts import Participant
from benchmarks.summary import Run

FAKE = Path(__file__).with_name("fake_worker.py")


def a_plan(**changes) -> Plan:
    values = {"cases": (Case(3),), "new_tokens": 2, "pairs": 2, "threads": 1, "loads": 1, "wait_s": 0.0}
    return Plan(**values | {"text_ids": tuple(range(100))} | changes)


def fakes(*names: str, **faults: str) -> list[Participant]:
    """Runtimes by name; faults: name -> what that one does wrong."""
    return [Participant(n, n, (sys.executable, FAKE, faults.get(n, "")), FAKE) for n in names]


@pytest.fixture
def foreign_work(monkeypatch):
    """Makes other processes use one core in the given measurements, none in the others."""

    def set_up(disturbed: set[int]) -> None:
        measured = iter(range(1000))

        def run(worker, plan, case, number):
            foreign = 1.0 if number >= 0 and next(measured) in disturbed else 0.0
            return Run(worker.name, number, case, 0.0, 0.1, 0.1, 1, ((1, 2),), foreign)

        monkeypatch.setattr(interleaved, "_run", run)

    return set_up


def test_all_take_turns_in_an_order_that_rotates(tmp_path, foreign_work):
    foreign_work(set())
    found = measure(fakes("a", "b", "c"), a_plan(pairs=3), tmp_path)
    assert "".join(run.peer for run in found.runs) == "abcbcacab"
    assert [run.round for run in found.runs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_every_start_is_a_fresh_process_and_takes_longer_than_its_load(tmp_path, foreign_work):
    foreign_work(set())
    found = measure(fakes("a", "b"), a_plan(loads=2, pairs=1), tmp_path)
    assert {name: len(loads) for name, loads in found.load_s.items()} == {"a": 2, "b": 2}
    for name, starts in found.cold_start_s.items():
        for start, load in zip(starts, found.load_s[name], strict=True):
            assert start > load + 0.06  # its setup and prefill sleep as long


def test_memory_is_reported_by_batch_and_disk_is_the_models_size(tmp_path, foreign_work):
    foreign_work(set())
    found = measure(fakes("a"), a_plan(cases=(Case(3, 4), Case(3, 1))), tmp_path)
    assert list(found.peak_rss_mb["a"]) == [1, 4]
    assert found.peak_rss_mb["a"][1] <= found.peak_rss_mb["a"][4]
    assert found.disk_mb == {"a": FAKE.stat().st_size / 1e6}


def test_a_disturbed_round_is_measured_again_and_not_counted(tmp_path, foreign_work):
    foreign_work({1})
    found = measure(fakes("a", "b"), a_plan(pairs=2), tmp_path)
    assert found.quiet_rounds == (1, 2)
    assert [run.round for run in found.counted(2)] == [1, 1, 2, 2]


def test_on_a_busy_machine_it_ends_and_counts_everything(tmp_path, foreign_work):
    foreign_work(set(range(1000)))
    found = measure(fakes("a"), a_plan(pairs=3), tmp_path)
    assert len(found.runs) == len(found.counted(3)) == 6
    assert found.quiet_rounds == ()


def test_real_processes_end_to_end(tmp_path):
    found = measure(fakes("a", "b"), a_plan(pairs=1, cases=(Case(3), Case(3, 2))), tmp_path)
    of_round_0 = [run for run in found.runs if run.round == 0]
    assert [(run.peer, run.case.batch) for run in of_round_0] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [run.token_ids for run in of_round_0] == [((3, 4),)] * 2 + [((3, 4), (4, 5))] * 2
    assert [run.decoded_tokens for run in of_round_0] == [1, 1, 2, 2]


def test_who_cannot_run_a_case_is_left_out_of_it_with_the_reason(tmp_path):
    plan = a_plan(pairs=1, cases=(Case(3), Case(3, 2)))
    found = measure(fakes("a", "b", b="one row"), plan, tmp_path)
    assert found.left_out == (LeftOut("b", Case(3, 2), "it takes one row"),)
    assert {(run.peer, run.case.batch) for run in found.runs} == {("a", 1), ("a", 2), ("b", 1)}
    assert list(found.peak_rss_mb["b"]) == [1]


def test_who_cannot_be_started_is_left_out_of_everything(tmp_path):
    found = measure(fakes("a", "b", b="cannot load"), a_plan(pairs=1), tmp_path)
    assert found.failed.keys() == {"b"}
    assert "is not a model" in found.failed["b"]
    assert found.load_s.keys() == found.disk_mb.keys() == found.peak_rss_mb.keys() == {"a"}
    assert {run.peer for run in found.runs} == {"a"}


def test_without_the_first_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(BenchmarkError, match="a died"):
        measure(fakes("a", "b", a="cannot load"), a_plan(), tmp_path)


def test_who_dies_later_ends_the_comparison(tmp_path):
    with pytest.raises(BenchmarkError, match=r"b died \(signal SIGABRT\) when asked to run"):
        measure(fakes("a", "b", b="crashes"), a_plan(), tmp_path)


def test_each_round_and_row_has_another_prompt_and_all_runtimes_the_same():
    plan = a_plan()
    assert plan.prompts(Case(3), 0) == [[0, 1, 2]]
    assert plan.prompts(Case(3), 1) == [[37, 38, 39]]
    assert len({tuple(plan.prompts(Case(3), n)[0]) for n in range(18)}) == 18
    assert len({tuple(prompt) for prompt in plan.prompts(Case(3, 8), 0)}) == 8
    assert plan.prompts(Case(250), 0)[0][:201:100] == [0, 0, 0]  # longer than the text: it starts again


def test_the_prompt_that_wakes_is_as_long_and_another():
    plan = a_plan()
    for number in range(10):
        assert len(plan.wake_prompt(Case(3), number)) == 3
        assert plan.wake_prompt(Case(3), number) not in plan.prompts(Case(3, 8), number)


def test_long_prompts_are_run_alone_only():
    found = cases([1500, 32, 512, 32], [4, 1], 512)
    assert found == (Case(32), Case(512), Case(1500), Case(32, 4), Case(512, 4))
