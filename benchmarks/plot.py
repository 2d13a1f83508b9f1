"""The picture of a comparison: bars of decode and prefill by prompt length, a column a batch, with their spread."""

from pathlib import Path
from typing import Any

from . import BenchmarkError
from .report import Report
from .summary import Comparison

SHOWN = {"decode_tokens_per_s": "decode tok/s", "prefill_tokens_per_s": "prefill tok/s"}
"""Metric -> what its row of panels is called."""


def draw(report: Report, path: Path) -> None:
    """Write the picture; the suffix says the format. A bar is a median, its line reaches from the least to the most.

    Raises:
        BenchmarkError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise BenchmarkError("--plot needs matplotlib: pip install 'zonda[plot]'") from error
    batches = sorted({case.batch for case in report.plan.cases})
    prompts = {batch: sorted({c.prompt_tokens for c in report.plan.cases if c.batch == batch}) for batch in batches}
    figure, panels = plt.subplots(
        len(SHOWN),
        len(batches),
        figsize=(2.5 + 3.6 * sum(map(len, prompts.values())) ** 0.8, 8),
        width_ratios=[len(prompts[batch]) for batch in batches],
        squeeze=False,
        layout="constrained",
    )
    comparisons = {(one.case.batch, one.case.prompt_tokens, one.peer): one for one in report.comparisons()}
    for row, (metric, title) in enumerate(SHOWN.items()):
        for column, batch in enumerate(batches):
            cells = {key[1:]: one for key, one in comparisons.items() if key[0] == batch}
            _bars(panels[row, column], cells, metric, prompts[batch], report.titles)
            panels[row, column].set_title(f"{title}, batch {batch}", fontsize="medium")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize="small")
    measured = len({run.round for run in report.measurement.counted(report.plan.pairs)})
    caption = f"{report.model['name']}, {report.plan.threads} threads, {measured} rounds; {report.machine.cpu}"
    figure.supxlabel(caption, fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"--plot {path}: the picture cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _bars(
    panel: Any, cells: dict[tuple[int, str], Comparison], metric: str, prompts: list[int], titles: dict[str, str]
) -> None:
    """A group of bars a prompt length, a bar a runtime; every runtime keeps its place and its colour."""
    width = 0.84 / len(titles)
    for number, (peer, title) in enumerate(titles.items()):
        at = [place for place, prompt in enumerate(prompts) if (prompt, peer) in cells]
        spreads = [cells[prompts[place], peer].metrics[metric] for place in at]
        heights = [spread.median for spread in spreads]
        reach = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
        places = [place + (number - (len(titles) - 1) / 2) * width for place in at]
        panel.bar(places, heights, width * 0.92, label=title, color=f"C{number}", zorder=2)
        panel.errorbar(places, heights, reach, fmt="none", ecolor="black", elinewidth=1, capsize=2, zorder=3)
        for x, spread in zip(places, spreads, strict=True):
            text = f"{spread.median:.3g}" if spread.median < 100 else f"{spread.median:.0f}"
            panel.annotate(
                text, (x, spread.max), (0, 5), textcoords="offset points", ha="center", fontsize=7, rotation=90
            )
    panel.set_xticks(range(len(prompts)), [f"prompt {prompt}" for prompt in prompts])
    panel.margins(y=0.14)
    panel.grid(axis="y", alpha=0.3, zorder=0)
