"""What a comparison found, as JSON (every run) and as tables for people (medians and ratios)."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from .interleaved import Measurement, Plan
from .machine import Machine
from .summary import METRICS, Comparison, Spread, compare

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison of `subject` with the others.

    model: name and sha256 of the weights. titles and versions: by peer. skipped: peer -> why it took no part.
    """

    subject: str
    model: dict[str, str]
    machine: Machine
    plan: Plan
    titles: dict[str, str]
    versions: dict[str, dict[str, str]]
    skipped: dict[str, str]
    measurement: Measurement

    def comparisons(self) -> list[Comparison]:
        """Every peer at every prompt length."""
        return compare(self.measurement.counted(self.plan.pairs), self.subject)

    def to_json(self) -> str:
        """Everything, the single runs included; seconds, MB (10⁶ bytes) and tokens."""
        content: dict[str, Any] = {"schema": SCHEMA, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        content |= asdict(self)
        content["comparisons"] = [asdict(one) for one in self.comparisons()]
        return json.dumps(content, indent=1)

    def print(self, console: Console) -> None:
        """Two tables: speed with the subject's advantage pair by pair; loading, memory and versions."""
        console.print(
            f"[bold]{self.model['name']}[/bold], {self.plan.threads} threads, {self.plan.new_tokens} new tokens"
        )
        console.print(str(self.machine), style="dim", highlight=False)
        console.print(self._speed())
        console.print(self._footprint())
        for name, reason in self.skipped.items():
            console.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
        console.print(self._circumstances(), style="dim", highlight=False)

    def _speed(self) -> Table:
        table = Table(
            title="Medians; × is the advantage of " + self.titles[self.subject] + ": median (min–max) of pairs"
        )
        table.add_column("prompt", justify="right")
        table.add_column("runtime", no_wrap=True)
        for metric in METRICS.values():
            table.add_column(metric.title, justify="right")
            table.add_column("×", justify="right")
        table.add_column("same text", justify="right")
        previous = None
        for one in self.comparisons():
            if previous not in (None, one.prompt_tokens):
                table.add_section()
            previous = one.prompt_tokens
            cells = [str(one.prompt_tokens), self.titles[one.peer]]
            for name in METRICS:
                cells.append(f"{one.metrics[name].median:.1f}")
                cells.append(_ratio(one.advantages[name]) if name in one.advantages else "")
            table.add_row(*cells, self._agreement(one))
        return table

    def _footprint(self) -> Table:
        table = Table(title="In a process of its own")
        table.add_column("runtime", no_wrap=True)
        table.add_column("load s", justify="right")
        table.add_column("peak RSS MB", justify="right")
        table.add_column("versions", overflow="fold")
        for name, loads in self.measurement.load_s.items():
            versions = ", ".join(f"{package} {version}" for package, version in self.versions[name].items())
            peak = f"{self.measurement.peak_rss_mb[name]:.0f}"
            table.add_row(self.titles[name], f"{Spread.of(loads).median:.2f}", peak, versions)
        return table

    def _agreement(self, one: Comparison) -> str:
        if one.peer == self.subject:
            return ""
        differs = "" if one.first_difference is None else f", differs from token {one.first_difference}"
        return f"{one.equal_texts} of {one.rounds}{differs}"

    def _circumstances(self) -> str:
        measured = len({run.round for run in self.measurement.runs})
        quiet, pairs = len(self.measurement.quiet_rounds), self.plan.pairs
        text = f"{measured} rounds, {quiet} of them on a quiet machine"
        if 2 * quiet < pairs:
            return text + ": too few, so all are counted. Other processes disturbed this comparison; repeat it."
        return text + (": only these are counted." if quiet < measured else ".")


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.min:.2f}–{spread.max:.2f})"
