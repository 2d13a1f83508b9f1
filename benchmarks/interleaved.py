"""The measurement: every peer in a process of its own, taking turns, in an order that rotates from round to round.

Load times come first, each in a fresh process, the peers taking turns there too; the processes of the last turn stay
for the runs. A round is one run of every peer at every prompt length, each round on another stretch of the text (no
prefix cache helps). A round during which other processes used the machine is measured again, up to twice as many
rounds as were asked for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .machine import QUIET_CORES, busy_seconds, wait_until_quiet
from .process import Worker
from .summary import Run


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. text_ids: the text that prompts are cut from."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    pairs: int
    threads: int
    loads: int
    text_ids: tuple[int, ...]
    wait_s: float = 30.0

    def prompt(self, length: int, number: int) -> list[int]:
        """The prompt of one round: `length` tokens from a start that moves on with the round's number."""
        start = 37 * number  # any step that keeps the starts of some dozens of rounds apart
        return [self.text_ids[(start + i) % len(self.text_ids)] for i in range(length)]


@dataclass(frozen=True, slots=True)
class Participant:
    """A peer as a process to start: the worker's command, and the model it loads."""

    name: str
    command: tuple[str | Path, ...]
    model: Path


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything measured. quiet_rounds: those in which nothing else used the machine."""

    load_s: Mapping[str, tuple[float, ...]]
    peak_rss_mb: Mapping[str, float]
    runs: tuple[Run, ...]
    quiet_rounds: tuple[int, ...]

    def counted(self, pairs: int) -> tuple[Run, ...]:
        """The runs that the summary counts: of the quiet rounds if there are as many as half the pairs, else all."""
        if 2 * len(self.quiet_rounds) < pairs:
            return self.runs
        return tuple(run for run in self.runs if run.round in self.quiet_rounds)


def measure(
    participants: Sequence[Participant], plan: Plan, logs: Path, progress: Callable[[str], None] = lambda _: None
) -> Measurement:
    """Load all participants, and run the rounds.

    Args:
        participants: at least one.
        plan: what to measure.
        logs: folder for what the processes write to stderr.
        progress: told what happens next.

    Raises:
        BenchmarkError: a process died; the message ends with what it wrote to stderr.
    """
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        load_s: dict[str, list[float]] = {one.name: [] for one in participants}
        for turn in range(plan.loads):
            for one in participants:
                progress(f"load {turn + 1} of {plan.loads}: {one.name}")
                worker = stack.enter_context(Worker(one.name, one.command, plan.threads, logs / f"{one.name}.log"))
                reply = worker.request(do="load", model=str(one.model), threads=plan.threads)
                load_s[one.name].append(reply["load_s"])
                if turn < plan.loads - 1:
                    worker.kill()
                workers[one.name] = worker
        for worker in workers.values():
            progress(f"warm up: {worker.name}")
            for length in plan.prompt_tokens:
                _run(worker, plan, length, -1)
        runs, quiet = _rounds(list(workers.values()), plan, progress)
        peaks = {name: worker.close() for name, worker in workers.items()}
    return Measurement({name: tuple(all_) for name, all_ in load_s.items()}, peaks, tuple(runs), tuple(quiet))


def _rounds(workers: list[Worker], plan: Plan, progress: Callable[[str], None]) -> tuple[list[Run], list[int]]:
    runs: list[Run] = []
    quiet: list[int] = []
    for number in range(2 * plan.pairs):
        progress(f"round {number + 1}: {len(quiet)} of {plan.pairs} measured on a quiet machine")
        wait_until_quiet(plan.wait_s)
        first = number % len(workers)
        turn = [
            _run(worker, plan, length, number)
            for length in plan.prompt_tokens
            for worker in workers[first:] + workers[:first]
        ]
        runs += turn
        if all(run.foreign_cores <= QUIET_CORES for run in turn):
            quiet.append(number)
        if len(quiet) == plan.pairs:
            break
    return runs, quiet


def _run(worker: Worker, plan: Plan, length: int, number: int) -> Run:
    busy, own, started = busy_seconds(), worker.cpu_seconds(), time.perf_counter()
    reply = worker.request(
        do="run",
        prompt_ids=plan.prompt(length, number),
        new_tokens=plan.new_tokens,
        wake_ids=plan.prompt(length, number + len(plan.text_ids) // 2),  # as long, but sharing no prefix with it
    )
    elapsed = time.perf_counter() - started
    foreign = (busy_seconds() - busy) - (worker.cpu_seconds() - own)
    return Run(
        worker.name,
        number,
        length,
        reply["setup_s"],
        reply["prefill_s"],
        reply["decode_s"],
        tuple(reply["token_ids"]),
        foreign_cores=max(0.0, foreign / elapsed),
    )
