import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import interleaved
from benchmarks.interleaved import Measurement, Participant, Plan, measure
from benchmarks.machine import Machine
from benchmarks.report import Report
from benchmarks.summary import Run

FAKE = Path(__file__).with_name("fake_worker.py")


def a_plan(**changes) -> Plan:
    values = {"prompt_tokens": (3,), "new_tokens": 2, "pairs": 2, "threads": 1, "loads": 1, "wait_s": 0.0}
    return Plan(**values | {"text_ids": tuple(range(100))} | changes)


def fakes(*names: str) -> list[Participant]:
    return [Participant(name, (sys.executable, FAKE), Path("m")) for name in names]


@pytest.fixture
def foreign_work(monkeypatch):
    """Makes other processes use one core in the given measurements, none in the others."""

    def set_up(disturbed: set[int]) -> None:
        measured = iter(range(1000))

        def run(worker, plan, length, number):
            reply = Run(worker.name, number, length, 0.0, 0.1, 0.1, (1, 2), 0.0)
            if number < 0:
                return reply
            foreign = 1.0 if next(measured) in disturbed else 0.0
            return Run(worker.name, number, length, 0.0, 0.1, 0.1, (1, 2), foreign)

        monkeypatch.setattr(interleaved, "_run", run)

    return set_up


def test_all_take_turns_in_an_order_that_rotates(tmp_path, foreign_work):
    foreign_work(set())
    found = measure(fakes("a", "b", "c"), a_plan(pairs=3), tmp_path)
    assert "".join(run.peer for run in found.runs) == "abcbcacab"
    assert [run.round for run in found.runs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_every_load_is_in_a_fresh_process_and_is_reported(tmp_path, foreign_work):
    foreign_work(set())
    found = measure(fakes("a", "b"), a_plan(loads=2, pairs=1), tmp_path)
    assert {name: len(loads) for name, loads in found.load_s.items()} == {"a": 2, "b": 2}
    assert set(found.peak_rss_mb) == {"a", "b"}


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
    found = measure(fakes("a", "b"), a_plan(pairs=1), tmp_path)
    of_round_0 = [run for run in found.runs if run.round == 0]
    assert [run.peer for run in of_round_0] == ["a", "b"]
    assert {run.token_ids for run in of_round_0} == {(3, 4)}


def test_each_round_has_another_prompt_and_all_peers_the_same():
    plan = a_plan()
    assert plan.prompt(3, 0) == [0, 1, 2]
    assert plan.prompt(3, 1) == [37, 38, 39]
    assert len({tuple(plan.prompt(3, n)) for n in range(18)}) == 18
    assert plan.prompt(250, 0)[:201:100] == [0, 0, 0]  # longer than the text: it starts again


def a_report(quiet_rounds: tuple[int, ...]) -> Report:
    runs = [
        Run(peer, n, 32, 0.0, 0.032, step, ids, 0.0)
        for n in range(2)
        for peer, step, ids in (("a", 0.5, (1, 2)), ("b", 1.0, (1, 9)))
    ]
    return Report(
        subject="a",
        model={"name": "model.gguf", "sha256": "0"},
        machine=Machine.describe(),
        plan=a_plan(),
        titles={"a": "Engine A", "b": "Engine B"},
        versions={"a": {"engine": "1.0"}, "b": {}},
        skipped={"c": "not installed: c"},
        measurement=Measurement({"a": (1.0,), "b": (2.0,)}, {"a": 10.0, "b": 20.0}, tuple(runs), quiet_rounds),
    )


def printed(report: Report) -> str:
    out = StringIO()
    report.print(Console(file=out, width=200))
    return out.getvalue()


def test_the_tables_show_medians_advantages_texts_and_who_was_skipped():
    text = printed(a_report((0, 1)))
    assert "1000.0" in text  # prefill tok/s
    assert "2.00 (2.00–2.00)" in text  # A decodes twice as fast
    assert "0 of 2, differs from token 1" in text
    assert "skipped c: not installed: c" in text
    assert "engine 1.0" in text


def test_a_disturbed_comparison_says_so():
    assert "repeat it" in printed(a_report(()))
    assert "only these are counted" in printed(a_report((1,)))


def test_json_holds_the_machine_every_run_and_the_comparisons():
    content = json.loads(a_report((0, 1)).to_json())
    assert content["schema"] == 1
    assert content["machine"]["cpu"]
    assert len(content["measurement"]["runs"]) == 4
    assert content["comparisons"][1]["advantages"]["decode_tokens_per_s"]["median"] == 2.0
    assert content["skipped"] == {"c": "not installed: c"}
