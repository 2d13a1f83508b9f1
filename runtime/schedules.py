"""Schedules: the ways in which an engine is asked to compute the same tokens.

The reference computes each prompt once. An engine must give the same logits however the tokens come: at once, in
chunks, one by one, beside rows of other lengths or idle ones. Knows lengths and limits only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .manifest import Limits

DECODED = 4
"""Tokens at the end of a prompt that come one by one where a schedule is about something else."""
_QUICK = 24
"""Tokens of a quick schedule's prompt, at least: with fewer a graph that is for long steps would not run."""
_SCORED = 32
"""New tokens of a row where the logits of several rows are asked for at once: they would fill the memory."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """rows: the prompts that take part, in the order of their cache rows. steps: new tokens of each row, a step.

    first_row: the cache row of the first of them. last_only: logits of each row's last new token only, as generation
    asks for them; else of all. Each row's tokens add up to its prompt.
    """

    name: str
    rows: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    first_row: int = 0
    last_only: bool = False


def schedules(lengths: Sequence[int], limits: Limits) -> list[Schedule]:
    """All schedules for prompts of these lengths, as far as the limits allow.

    Args:
        lengths: tokens of each prompt, shortest first.
        limits: at most max_batch rows and max_chunk new tokens a row in a step.
    """
    rows = min(len(lengths), limits.max_batch)
    batch = tuple(range(len(lengths) - rows, len(lengths)))
    longest = len(lengths) - 1
    plans = [
        Schedule("prefill", (row,), _steps([_chunks(length, limits.max_chunk)]), first_row=row % rows)
        for row, length in enumerate(lengths)
    ]
    chunk = max(1, min(limits.max_chunk, lengths[longest] * 2 // 5))
    plans.append(Schedule("chunked prefill", (longest,), _steps([_chunks(lengths[longest], chunk)]), rows - 1))
    short = _short(lengths)
    plans.append(Schedule("decode", (short,), _steps([[1] * lengths[short]])))
    if rows > 1:
        ragged = [_prefill_then_decode(lengths[row], limits.max_chunk) for row in batch]
        plans.append(Schedule("ragged batch", batch, _steps(ragged), last_only=True))
        woven = [_continued(lengths[row], min(limits.max_chunk, _SCORED), start) for start, row in enumerate(batch)]
        plans.append(Schedule("continuation with idle rows", batch, _steps(woven)))
    else:
        plans.append(Schedule("continuation", (longest,), _steps([_continued(lengths[longest], limits.max_chunk, 0)])))
    return plans


def quick_schedules(lengths: Sequence[int], limits: Limits) -> list[Schedule]:
    """One short prompt: most of it at once, the rest one by one."""
    short = next((row for row, length in enumerate(lengths) if length >= _QUICK), len(lengths) - 1)
    return [Schedule("quick", (short,), _steps([_prefill_then_decode(lengths[short], limits.max_chunk)]))]


def _short(lengths: Sequence[int]) -> int:
    """The prompt whose length is nearest to 16."""
    return min(range(len(lengths)), key=lambda row: abs(lengths[row] - 16))


def _chunks(length: int, chunk: int) -> list[int]:
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def _prefill_then_decode(length: int, chunk: int) -> list[int]:
    decoded = min(DECODED, length - 1)
    return [*_chunks(length - decoded, chunk), *[1] * decoded]


def _continued(length: int, chunk: int, start: int) -> list[int]:
    """A third at once, some tokens one by one, then the rest at once; the row idles `start` steps first, once after."""
    third = max(1, length // 3)
    single = min(DECODED, length - third)
    rest = length - third - single
    return [*[0] * start, *_chunks(third, chunk), *[1] * single, 0, *_chunks(rest, chunk)]


def _steps(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Columns of the rows; a row that is done idles, and a step in which all do is left out."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return tuple(step for step in zip(*padded, strict=True) if any(step))
