"""The statistics: medians of repetitions, and ratios pair by pair. It knows nothing of processes or tables.

Runs of one round lie close together in time and are compared with each other only: what slows the machine down for a
while slows both of a pair, and their ratio does not see it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

from .plan import Case


@dataclass(frozen=True, slots=True)
class Run:
    """One generation of a batch by one runtime.

    setup_s, prefill_s, decode_s, decoded_tokens: as `Meter.reading` gives them. token_ids: a row each.
    foreign_cores: CPU time a second that other processes used meanwhile.
    """

    peer: str
    round: int
    case: Case
    setup_s: float
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    token_ids: tuple[tuple[int, ...], ...]
    foreign_cores: float


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a run. lower_is_better turns its ratio over, so that more than 1 always favours the subject."""

    title: str
    of: Callable[[Run], float]
    lower_is_better: bool = False


METRICS = {
    "prefill_tokens_per_s": Metric(
        "prefill tok/s", lambda run: run.case.prompt_tokens * run.case.batch / run.prefill_s
    ),
    "first_token_ms": Metric("first token ms", lambda run: 1e3 * (run.setup_s + run.prefill_s), lower_is_better=True),
    "decode_tokens_per_s": Metric("decode tok/s", lambda run: run.decoded_tokens / run.decode_s),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """The smallest, the median and the largest of some values."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of at least one value."""
        listed = list(values)
        return cls(min(listed), median(listed), max(listed))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One peer in one case.

    metrics: its own figures. advantages: the subject's, pair by pair, above 1 where the subject is better; empty for
    the subject itself, and where the subject was left out. equal_texts: rows of all rounds in which it generated the
    subject's tokens, of `texts`. first_difference: the earliest generated token at which it ever did not.
    """

    peer: str
    case: Case
    rounds: int
    metrics: dict[str, Spread]
    advantages: dict[str, Spread]
    equal_texts: int
    texts: int
    first_difference: int | None


def compare(runs: Sequence[Run], subject: str) -> list[Comparison]:
    """Compare every peer with the subject, case by case, in the order of their first runs."""
    by_case: dict[tuple[Case, str], dict[int, Run]] = {}
    for run in runs:
        by_case.setdefault((run.case, run.peer), {})[run.round] = run
    comparisons = []
    for (case, peer), own in by_case.items():
        subjects = by_case.get((case, subject), {})
        pairs = [(subjects[number], run) for number, run in own.items() if number in subjects]
        rows = [row for ours, theirs in pairs for row in zip(ours.token_ids, theirs.token_ids, strict=True)]
        differences = [first_difference(ours, theirs) for ours, theirs in rows]
        found = [position for position in differences if position is not None]
        compared = METRICS if pairs and peer != subject else {}
        comparisons.append(
            Comparison(
                peer,
                case,
                rounds=len(own),
                metrics={name: Spread.of(map(metric.of, own.values())) for name, metric in METRICS.items()},
                advantages={name: _advantage(metric, pairs) for name, metric in compared.items()},
                equal_texts=len(differences) - len(found),
                texts=len(differences),
                first_difference=min(found, default=None),
            )
        )
    return comparisons


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position at which two sequences differ, None if they are equal."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _advantage(metric: Metric, pairs: Iterable[tuple[Run, Run]]) -> Spread:
    ratios = (metric.of(ours) / metric.of(theirs) for ours, theirs in pairs)
    return Spread.of(1 / ratio if metric.lower_is_better else ratio for ratio in ratios)
