"""A comparison for readers: a table on a terminal, and JSON."""

from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ...runtime.metrics import Thresholds, Verdict
from .finding import Finding
from .layers import LayerReport
from .measure import Statistics, StepReport

_STYLES = {Verdict.PASS: "green", Verdict.AMBIGUOUS: "yellow", Verdict.FAIL: "red"}


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All that `zonda compare` found. finding: None if the two agree, or nothing can be located."""

    a: str
    b: str
    thresholds: Thresholds
    steps: tuple[StepReport, ...]
    layers: tuple[LayerReport, ...]
    finding: Finding | None = None

    @property
    def agrees(self) -> bool:
        """Whether every step passed and nothing was found."""
        return self.finding is None and all(self.steps)


def to_json(found: Comparison) -> bytes:
    """The comparison as JSON, infinities and NaN as null; `agrees` and the finding's `sentence` beside the fields."""
    values = msgspec.to_builtins(found)
    values["agrees"] = found.agrees
    if found.finding is not None:
        values["finding"]["sentence"] = found.finding.sentence()
    return msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n"


def show(found: Comparison, console: Console, *, layers: bool) -> None:
    """Print tables and, if the two part, where."""
    console.print(_steps(found))
    if layers:
        console.print(_layers(found.layers, found.thresholds))
    if found.finding is not None:
        console.print(_finding(found.finding))
    words = "they agree" if found.agrees else "they differ"
    console.print(Text(f"{words} (thresholds of {found.thresholds.name})", style="green" if found.agrees else "red"))


def _steps(found: Comparison) -> Table:
    table = Table(title=Text(f"{found.b} against {found.a}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "tokens", "1 - cos", "norm - 1", "relative", "largest", "top-1", "top-10", "K and V", ""):
        table.add_column(name, justify="left" if name in ("step", "") else "right", no_wrap=True)
    for s in found.steps:
        ties = f" ({s.near_ties} near tie{'s' if s.near_ties > 1 else ''})" if s.near_ties else ""
        table.add_row(
            f"{s.step} {s.title}",
            str(s.tokens),
            f"{1 - s.cosine:.1e}",
            f"{s.norm_ratio - 1:.1e}",
            f"{s.relative_error:.1e}",
            f"{s.max_error:.1e}",
            f"{round(s.top1_agreement * s.tokens)}/{s.tokens}",
            f"{s.top10_overlap:.0%}",
            _number(s.kv_error),
            Text(s.verdict.upper() + ties, style=_STYLES[s.verdict]),
        )
    return table


def _layers(layers: Sequence[LayerReport], thresholds: Thresholds) -> Table:
    table = Table(title=f"by layer; {thresholds.kv_error:.1e} is allowed of keys and values", title_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for name in ("layer", "keys", "values", "farthest tensor", "its error", "one operation"):
        table.add_column(name, justify="left" if name == "farthest tensor" else "right")
    for one in layers:
        table.add_row(
            str(one.layer), _number(one.keys), _number(one.values), one.worst, _number(one.error), _number(one.single)
        )
    return table


def _finding(finding: Finding) -> Group:
    table = Table("", "mean", "std", "min", "max", "norm", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, numbers in ((finding.between[0], finding.reference), (finding.between[1], finding.found)):
        if numbers is not None:
            fields = Statistics.__struct_fields__
            table.add_row(Text(name), *(f"{getattr(numbers, field):.6g}" for field in fields))
    more = [f"{place.tensor} ({place.marker}, {place.error:.1e})" for place in finding.also[:8]]
    lines: list[Text | Table] = [Text(finding.sentence(), style="bold"), table]
    if more:
        left = f" and {len(finding.also) - 8} more" if len(finding.also) > 8 else ""
        lines.append(Text(f"also different by themselves: {', '.join(more)}{left}"))
    return Group(*lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
