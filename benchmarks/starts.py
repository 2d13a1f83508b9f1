"""Starting the runtimes: each in fresh processes that load and generate one token, the runtimes taking turns.

The first turn is not timed: it fills the page cache, and shows who works here at all.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import BenchmarkError
from .plan import Case, Plan
from .process import Worker

COLD_PROMPT_TOKENS = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Participant:
    """A runtime as a process to start: the worker's command, and the model it loads."""

    name: str
    title: str
    command: tuple[str | Path, ...]
    model: Path


class Starts:
    """Starts everybody, again and again, and keeps the times.

    load_s: seconds of loading, cold_start_s: from the start of the process to its first token, a figure a turn. failed:
    who died at first -> why; it is in neither.
    """

    def __init__(self, participants: Sequence[Participant], plan: Plan, logs: Path) -> None:
        self._participants = list(participants)
        self._plan = plan
        self._logs = logs
        self.load_s: dict[str, list[float]] = {}
        self.cold_start_s: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def make(self, progress: Callable[[str], None], stack: ExitStack) -> list[Worker]:
        """The workers of the last turn, in the participants' order, with their models loaded."""
        workers: dict[str, Worker] = {}
        for turn in range(self._plan.loads + 1):
            for one in rotated(self._participants, turn):
                progress(f"start {turn} of {self._plan.loads}: {one.name}")
                if turn == 0:
                    self._try(one)
                else:
                    workers[one.name] = self._time(one, stack)
                    if turn < self._plan.loads:
                        workers[one.name].kill()
            self._participants = [one for one in self._participants if one.name not in self.failed]
        return [workers[one.name] for one in self._participants]

    def _try(self, one: Participant) -> None:
        """The first start, which fills the page cache and shows whether the runtime works here at all."""
        try:
            with self._worker(one) as worker:
                self._load(worker, one)
        except BenchmarkError as reason:
            if one is self._participants[0]:
                raise
            self.failed[one.name] = str(reason).strip()

    def _time(self, one: Participant, stack: ExitStack) -> Worker:
        began = time.perf_counter()
        worker = stack.enter_context(self._worker(one))
        load_s = self._load(worker, one)
        self.cold_start_s.setdefault(one.name, []).append(time.perf_counter() - began)
        self.load_s.setdefault(one.name, []).append(load_s)
        return worker

    def _worker(self, one: Participant) -> Worker:
        return Worker(one.name, one.command, self._plan.threads, self._logs / f"{one.name}.log")

    def _load(self, worker: Worker, one: Participant) -> float:
        """Load the model and generate a token, without a pause between them; seconds of loading."""
        loaded, _ = worker.requests(
            {"do": "load", "model": str(one.model), "threads": self._plan.threads},
            {"do": "first", "prompt_ids": self._plan.prompts(Case(COLD_PROMPT_TOKENS), 0)[0]},
        )
        return float(loaded["load_s"])


def rotated(all_: Sequence[T], turn: int) -> list[T]:
    """In the order of a turn: each begins with another, so that nobody is always after the same."""
    first = turn % len(all_)
    return [*all_[first:], *all_[:first]]
