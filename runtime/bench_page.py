"""What `zonda bench` prints: the figures of each target, and what was picked and why."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table

from .bench import REQUEST_TOKENS, BenchReport, TargetReport


def bench_page(report: BenchReport) -> RenderableType:
    """The page, as something `rich` prints."""
    measured = [target for target in report.targets if not target.failure]
    parts: list[RenderableType] = []
    if measured:
        parts += [_speeds(measured), _costs(measured)]
    return Group(*parts, *_remarks(report, measured))


def _speeds(targets: Sequence[TargetReport]) -> Table:
    table = Table(
        "target", *(_right(t) for t in ("prompt", "rows", "first token, ms", "prefill, tok/s", "decode, tok/s"))
    )
    for target in targets:
        for number, figures in enumerate(target.figures):
            table.add_row(
                "" if number else target.name,
                str(figures.prompt_tokens),
                str(figures.batch),
                f"{figures.first_token_s * 1e3:,.1f}",
                f"{figures.prefill_tokens_per_s:,.0f}",
                f"{figures.decode_tokens_per_s:,.1f}",
                end_section=number == len(target.figures) - 1,
            )
    return table


def _costs(targets: Sequence[TargetReport]) -> Table:
    table = Table("target", "dtype", "proof", *(_right(t) for t in ("load, s", "peak RSS, MB", "request, s")))
    for target in targets:
        table.add_row(
            target.name,
            target.dtype,
            "proven" if target.proven else "not proven",
            f"{target.load_s:.2f}",
            f"{target.peak_rss / 1e6:,.0f}",
            f"{target.request_s:.3f}",
        )
    return table


def _right(title: str) -> Column:
    return Column(title, justify="right")


def _remarks(report: BenchReport, measured: Sequence[TargetReport]) -> Iterator[str]:
    rounds = f"{report.repeat} rounds" if report.repeat > 1 else "one round"
    yield (
        f"Medians of {rounds} of {report.new_tokens} new tokens; random prompts, greedy. A request is a prompt and "
        f"{REQUEST_TOKENS} new tokens in one row, the mean over the prompts."
    )
    yield from report.notes
    for target in report.targets:
        if target.failure:
            yield f"{target.name}: not measured: {target.failure}"
        elif not target.proven and len(measured) > 1:
            yield f"{target.name} is not proven, so it is not picked: `zonda verify` proves it on this host"
    if report.picked:
        yield f"picked: {report.picked}; on this host Pipeline.load now prefers it to what it was compared with"
