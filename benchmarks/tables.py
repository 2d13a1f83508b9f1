"""A comparison as tables for people: medians, and ratios with their spread."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from .report import Report
from .summary import METRICS, Comparison, Spread


def show(report: Report, console: Console) -> None:
    """Speed with the subject's advantage pair by pair; starts, memory and disk; quality; and the circumstances."""
    plan = report.plan
    console.print(f"[bold]{report.model['name']}[/bold], {plan.threads} threads, {plan.new_tokens} new tokens")
    console.print(str(report.machine), style="dim", highlight=False)
    console.print(_speed(report))
    console.print(_footprint(report))
    if report.measurement.quality:
        console.print(_quality(report))
    for name, title in report.titles.items():
        packages = ", ".join(f"{package} {version}" for package, version in report.versions[name].items())
        console.print(f"{title}: {packages}", style="dim", highlight=False)
    for one in report.measurement.left_out:
        case = f"prompt {one.case.prompt_tokens}, batch {one.case.batch}"
        console.print(f"left out {one.peer}, {case}: {one.reason}", style="yellow", highlight=False)
    for name, reason in report.skipped.items():
        console.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
    console.print(_circumstances(report), style="dim", highlight=False)


def _speed(report: Report) -> Table:
    title = f"Medians; × is the advantage of {report.titles[report.subject]}: median (min–max) of pairs"
    table = Table(title=title)
    table.add_column("prompt", justify="right")
    table.add_column("batch", justify="right")
    table.add_column("runtime", no_wrap=True)
    for metric in METRICS.values():
        table.add_column(metric.title, justify="right")
        table.add_column("×", justify="right")
    table.add_column("same text", justify="right")
    previous = None
    for one in report.comparisons():
        if previous not in (None, one.case):
            table.add_section()
        previous = one.case
        cells = [str(one.case.prompt_tokens), str(one.case.batch), report.titles[one.peer]]
        for name in METRICS:
            cells.append(f"{one.metrics[name].median:.1f}")
            cells.append(_ratio(one.advantages[name]) if name in one.advantages else "")
        table.add_row(*cells, "" if one.peer == report.subject else _agreement(one))
    return table


def _footprint(report: Report) -> Table:
    found, subject = report.measurement, report.subject
    table = Table(title="In a process of its own; × as above")
    table.add_column("runtime", no_wrap=True)
    for title in ("load s", "×", "cold start s", "×"):
        table.add_column(title, justify="right")
    batches = sorted({case.batch for case in report.plan.cases})
    for batch in batches:
        table.add_column("peak RSS MB" if batch == 1 else f"at batch {batch}", justify="right")
        if batch == batches[0]:
            table.add_column("×", justify="right")
    table.add_column("disk MB", justify="right")
    for name, runtime in report.titles.items():
        cells = [runtime]
        for times in (found.load_s, found.cold_start_s):
            cells += [f"{Spread.of(times[name]).median:.2f}", "" if name == subject else _paired(times, name, subject)]
        peaks = found.peak_rss_mb[name]
        for batch in batches:
            cells.append(f"{peaks[batch]:.0f}" if batch in peaks else "–")
            if batch == batches[0]:
                both = name != subject and batch in peaks and batch in found.peak_rss_mb[subject]
                cells.append(f"{peaks[batch] / found.peak_rss_mb[subject][batch]:.2f}" if both else "")
        table.add_row(*cells, f"{found.disk_mb[name]:.0f}")
    return table


def _quality(report: Report) -> Table:
    found = {one.peer: one for one in report.measurement.quality}
    reference = found.get(report.reference or "")
    by = f", against {report.titles[reference.peer]}" if reference else ""
    table = Table(title=f"Quality on {len(report.plan.quality_ids)} tokens of Python's manual{by}")
    table.add_column("runtime", no_wrap=True)
    for title in ("perplexity", "ratio (± standard error)", "KL nats", "same top-1"):
        table.add_column(title, justify="right")
    for name, title in report.titles.items():
        if name not in found:
            table.add_row(title, "–", "", "", "")
            continue
        one = found[name]
        cells = ["", "", ""]
        if reference is not None and one is not reference:
            ratio, error = one.perplexity_ratio(reference)
            cells = [f"{ratio:.4f} ± {error:.4f}", f"{fmean(one.kl):.1e}", f"{100 * fmean(one.agreement):.2f} %"]
        table.add_row(title, f"{one.perplexity:.3f}", *cells)
    return table


def _agreement(one: Comparison) -> str:
    differs = "" if one.first_difference is None else f", differs from token {one.first_difference}"
    return f"{one.equal_texts} of {one.texts}{differs}"


def _circumstances(report: Report) -> str:
    measured = len({run.round for run in report.measurement.runs})
    quiet, pairs = len(report.measurement.quiet_rounds), report.plan.pairs
    text = f"{measured} rounds, {quiet} of them on a quiet machine"
    if 2 * quiet < pairs:
        return text + ": too few, so all are counted. Other processes disturbed this comparison; repeat it."
    return text + (": only these are counted." if quiet < measured else ".")


def _paired(times: Mapping[str, Sequence[float]], name: str, subject: str) -> str:
    """The subject's advantage, turn by turn."""
    return _ratio(Spread.of(theirs / ours for theirs, ours in zip(times[name], times[subject], strict=True)))


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.min:.2f}–{spread.max:.2f})"
