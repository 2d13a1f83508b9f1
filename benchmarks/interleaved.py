"""The measurement: every runtime in a process of its own, taking turns, in an order that rotates from round to round.

Starts come first (`starts.py`); the processes of the last turn stay for the runs. A round is one run of every runtime
in every case, each round on another stretch of the text (no prefix cache helps). A round during which other processes
used the machine is measured again, up to twice as many rounds as were asked for. Logits are compared last.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from . import UnavailableError
from .machine import QUIET_CORES, busy_seconds, wait_until_quiet
from .peer import disk_mb
from .plan import Case, Plan
from .process import Worker
from .quality import Quality, compare_logits
from .starts import Participant, Starts, rotated
from .summary import Run


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A case that a runtime cannot run, and why."""

    peer: str
    case: Case
    reason: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything measured, by the participants' names.

    load_s: importing the runtime and loading the model. cold_start_s: from the start of the process to its first token
    on the pipe. peak_rss_mb: by batch, after the cases of that batch and of smaller ones. disk_mb: of what is loaded.
    quiet_rounds: those in which nothing else used the machine. failed: who could not be started -> why; it is in none
    of the others.
    """

    load_s: Mapping[str, tuple[float, ...]]
    cold_start_s: Mapping[str, tuple[float, ...]]
    peak_rss_mb: Mapping[str, Mapping[int, float]]
    disk_mb: Mapping[str, float]
    runs: tuple[Run, ...]
    quiet_rounds: tuple[int, ...]
    left_out: tuple[LeftOut, ...] = ()
    quality: tuple[Quality, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    def counted(self, pairs: int) -> tuple[Run, ...]:
        """The runs that the summary counts: of the quiet rounds if there are as many as half the pairs, else all."""
        if 2 * len(self.quiet_rounds) < pairs:
            return self.runs
        return tuple(run for run in self.runs if run.round in self.quiet_rounds)


def measure(
    participants: Sequence[Participant],
    plan: Plan,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    reference: str | None = None,
) -> Measurement:
    """Start all participants, run the rounds, compare the logits. One that dies when it is first started is left out.

    Args:
        participants: at least one.
        plan: what to measure.
        work: folder for what the processes write: their logs, and logits, which do not stay.
        progress: told what happens next.
        reference: the participant that the others' logits are compared with.

    Raises:
        BenchmarkError: the first participant cannot be started, or a process died later; the message ends with what it
            wrote to stderr.
    """
    with ExitStack() as stack:
        starts = Starts(participants, plan, work / "logs")
        workers = starts.make(progress, stack)
        left_out, peaks = _warm_up(workers, plan, progress)
        runs, quiet = _rounds(workers, plan, {(one.peer, one.case) for one in left_out}, progress)
        quality = compare_logits(workers, plan.quality_ids, reference, work, progress)
    return Measurement(
        load_s={name: tuple(times) for name, times in starts.load_s.items()},
        cold_start_s={name: tuple(times) for name, times in starts.cold_start_s.items()},
        peak_rss_mb=peaks,
        disk_mb={one.name: disk_mb(one.model) for one in participants if one.name not in starts.failed},
        runs=tuple(runs),
        quiet_rounds=tuple(quiet),
        left_out=tuple(left_out),
        quality=quality,
        failed=starts.failed,
    )


def _warm_up(
    workers: Sequence[Worker], plan: Plan, progress: Callable[[str], None]
) -> tuple[list[LeftOut], dict[str, dict[int, float]]]:
    """Run every case once, small batches first; find out who cannot run it, and what memory a batch takes."""
    left_out: list[LeftOut] = []
    peaks: dict[str, dict[int, float]] = {worker.name: {} for worker in workers}
    for worker in workers:
        progress(f"warm up: {worker.name}")
        for case in sorted(plan.cases, key=lambda case: case.batch):
            try:
                _run(worker, plan, case, -1)
            except UnavailableError as reason:
                left_out.append(LeftOut(worker.name, case, str(reason)))
            else:
                peaks[worker.name][case.batch] = worker.peak_rss_mb()
    return left_out, peaks


def _rounds(
    workers: Sequence[Worker], plan: Plan, left_out: set[tuple[str, Case]], progress: Callable[[str], None]
) -> tuple[list[Run], list[int]]:
    runs: list[Run] = []
    quiet: list[int] = []
    for number in range(2 * plan.pairs):
        progress(f"round {number + 1}: {len(quiet)} of {plan.pairs} measured on a quiet machine")
        wait_until_quiet(plan.wait_s)
        turn = [
            _run(worker, plan, case, number)
            for case in plan.cases
            for worker in rotated(workers, number)
            if (worker.name, case) not in left_out
        ]
        runs += turn
        if all(run.foreign_cores <= QUIET_CORES for run in turn):
            quiet.append(number)
        if len(quiet) == plan.pairs:
            break
    return runs, quiet


def _run(worker: Worker, plan: Plan, case: Case, number: int) -> Run:
    busy, own, started = busy_seconds(), worker.cpu_seconds(), time.perf_counter()
    reply = worker.request(
        do="run",
        prompts=plan.prompts(case, number),
        new_tokens=plan.new_tokens,
        wake_ids=plan.wake_prompt(case, number),
    )
    elapsed = time.perf_counter() - started
    foreign = (busy_seconds() - busy) - (worker.cpu_seconds() - own)
    return Run(
        worker.name,
        number,
        case,
        reply["setup_s"],
        reply["prefill_s"],
        reply["decode_s"],
        reply["decoded_tokens"],
        tuple(tuple(row) for row in reply["token_ids"]),
        foreign_cores=max(0.0, foreign / elapsed),
    )
