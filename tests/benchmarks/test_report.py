"""What was measured, as tables, as JSON and back, and as a picture."""

import json
from io import StringIO

import msgspec
import pytest
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.interleaved import LeftOut, Measurement
from benchmarks.machine import Machine
from benchmarks.plan import Case, Plan
from benchmarks.plot import draw
from benchmarks.quality import Quality
from benchmarks.report import Report
from benchmarks.summary import Run
from benchmarks.tables import show

CASES = (Case(32), Case(512), Case(32, 8))


def a_report(quiet_rounds: tuple[int, ...] = (0, 1)) -> Report:
    """B takes twice the time of A, gives another second token, and cannot run the batch."""
    runs = [
        Run(peer, n, case, 0.0, 0.032, step, case.batch, (ids,) * case.batch, 0.0)
        for n in range(2)
        for case in CASES
        for peer, step, ids in (("a", 0.5, (1, 2)), ("b", 1.0, (1, 9)))
        if peer == "a" or case.batch == 1
    ]
    measurement = Measurement(
        load_s={"a": (1.0,), "b": (2.0,)},
        cold_start_s={"a": (1.5, 1.7), "b": (3.0, 5.1)},
        peak_rss_mb={"a": {1: 10.0, 8: 30.0}, "b": {1: 25.0}},
        disk_mb={"a": 93.4, "b": 538.2},
        runs=tuple(runs),
        quiet_rounds=quiet_rounds,
        left_out=(LeftOut("b", Case(32, 8), "it takes one row"),),
        quality=(Quality("a", (2.0, 2.1), (0.01, 0.03), (0.9, 1.0)), Quality("b", (1.9, 2.0))),
    )
    return Report(
        subject="a",
        model={"name": "model.gguf", "sha256": "0"},
        machine=Machine.describe(),
        plan=Plan(CASES, 2, 2, 1, 1, tuple(range(100)), tuple(range(1024))),
        titles={"a": "Engine A", "b": "Engine B"},
        versions={"a": {"engine": "1.0"}, "b": {}},
        skipped={"c": "not installed: c"},
        measurement=measurement,
        reference="b",
    )


def printed(report: Report) -> str:
    out = StringIO()
    show(report, Console(file=out, width=200))
    return out.getvalue()


def row_of(text: str, *beginning: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines()]
    (row,) = (row for row in rows if tuple(row[: len(beginning)]) == beginning)
    return row


def test_speed_has_medians_advantages_and_texts():
    row = row_of(printed(a_report()), "32", "1", "Engine B")
    assert row[3] == "1000.0"  # prefill tok/s
    assert row[8] == "2.00 (2.00–2.00)"  # A decodes twice as fast
    assert row[9] == "0 of 2, differs from token 1"


def test_a_batch_counts_all_its_tokens_and_stands_apart():
    assert row_of(printed(a_report()), "32", "8", "Engine A")[7] == "16.0"  # 8 tokens in half a second


def test_the_footprint_has_starts_by_turns_memory_by_batch_and_disk():
    text = printed(a_report())
    (b,) = (line for line in text.splitlines() if "Engine B" in line and "538" in line)
    assert [cell.strip() for cell in b.strip("│ ").split("│")] == [
        "Engine B", "2.00", "2.00 (2.00–2.00)", "4.05", "2.50 (2.00–3.00)", "25", "2.50", "–", "538",
    ]  # fmt: skip


def test_quality_is_against_the_reference_with_the_error_over_windows():
    row = row_of(printed(a_report()), "Engine A", "7.768")
    assert row[2:] == ["1.1052 ± 0.0000", "2.0e-02", "95.00 %"]
    assert row_of(printed(a_report()), "Engine B", "7.029")[2:] == []  # the reference itself


def test_who_was_left_out_or_skipped_is_told_and_the_versions():
    text = printed(a_report())
    assert "left out b, prompt 32, batch 8: it takes one row" in text
    assert "skipped c: not installed: c" in text
    assert "Engine A: engine 1.0" in text


def test_a_disturbed_comparison_says_so():
    assert "repeat it" in printed(a_report(()))
    assert "only these are counted" in printed(a_report((1,)))


def test_json_holds_the_machine_every_run_and_the_comparisons():
    content = json.loads(a_report().to_json())
    assert content["machine"]["cpu"]
    assert len(content["measurement"]["runs"]) == 10
    assert content["comparisons"][1]["advantages"]["decode_tokens_per_s"]["median"] == 2.0
    assert content["skipped"] == {"c": "not installed: c"}


def test_what_was_recorded_prints_the_same_again(tmp_path):
    recorded = tmp_path / "peers.json"
    recorded.write_bytes(a_report().to_json())
    assert Report.read(recorded) == a_report()
    assert printed(Report.read(recorded)) == printed(a_report())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a recorded comparison"),
        (b"{}", "not a recorded comparison"),
        (msgspec.json.encode(msgspec.to_builtins(a_report(), str_keys=True) | {"schema": 1}), "schema 1"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        Report.read(tmp_path / "x.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"none\.json cannot be read"):
        Report.read(tmp_path / "none.json")


def test_the_picture_has_a_bar_for_each_figure_and_leaves_room_for_who_was_left_out(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    draw(a_report(), tmp_path / "new" / "peers.png")
    assert (tmp_path / "new" / "peers.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = shown
    heights = {
        panel.get_title(): [
            round(bar.get_height()) for bars in panel.containers if hasattr(bars, "patches") for bar in bars
        ]
        for panel in figure.axes
    }
    assert heights == {
        "decode tok/s, batch 1": [2, 2, 1, 1],
        "decode tok/s, batch 8": [16],
        "prefill tok/s, batch 1": [1000, 16000, 1000, 16000],
        "prefill tok/s, batch 8": [8000],
    }
    a, _ = figure.axes[0].containers[0], None
    assert a.get_label() == "Engine A"


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(BenchmarkError, match="cannot be written"):
        draw(a_report(), tmp_path / "peers.nothing")
