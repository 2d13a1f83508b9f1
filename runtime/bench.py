"""`zonda bench`: the targets of a bundle measured on this host, taking turns, and the fastest proven one picked.

In each round every target loads and generates once, in a process of its own and in an order that moves on, so what
slows the machine for a while slows them alike. Figures are medians over the rounds. What is compared is the time of a
request: prompt and `REQUEST_TOKENS` new tokens, one row, the mean over the prompts. The pick is remembered outside
the bundle (`records.py`), and `Pipeline.load` prefers it to the targets that it was compared with.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import msgspec

from .. import EngineError, RequestError, ZondaError
from .bench_worker import Case, Reading, Request
from .bundle import Bundle
from .loader import obstacle
from .manifest import Limits, Target
from .records import is_proven, remember_pick

PROMPTS = (32, 512, 1500)
"""Tokens of the prompts, as far as the capacity allows."""

REQUEST_TOKENS = 128
"""New tokens of the request by whose time targets are compared: an answer of a few sentences."""

Measure = Callable[[Request], Reading]


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What every target is measured by. notes: what was asked for and cannot be, in sentences."""

    prompts: tuple[int, ...]
    batch: int
    new_tokens: int
    repeat: int
    threads: int | None
    notes: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        """One row at each prompt length, then the batch."""
        batches = (1,) if self.batch == 1 else (1, self.batch)
        return tuple(Case(prompt, batch) for batch in batches for prompt in self.prompts)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one case. decode_tokens_per_s: of all rows together."""

    prompt_tokens: int
    batch: int
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class TargetReport(msgspec.Struct, frozen=True, kw_only=True):
    """One target. failure: why it was not measured, empty if it was. request_s: see this file's head. rss in bytes."""

    name: str
    kind: str
    dtype: str
    proven: bool
    failure: str = ""
    load_s: float = 0.0
    peak_rss: int = 0
    request_s: float = 0.0
    figures: tuple[Figures, ...] = ()
    readings: tuple[Reading, ...] = ()


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; picked is the name of the fastest proven target, empty if there was nothing to choose between."""

    bundle: str
    new_tokens: int
    repeat: int
    notes: tuple[str, ...]
    targets: tuple[TargetReport, ...]
    picked: str = ""


def make_plan(
    limits: Limits, *, batch: int = 4, new_tokens: int = 64, repeat: int = 5, threads: int | None = None
) -> BenchPlan:
    """Fit what is asked for into the limits of a bundle.

    Raises:
        RequestError: a number is too small, or the bundle holds too few tokens to measure anything.
    """
    smallest = {"batch": (batch, 1), "tokens": (new_tokens, 2), "repeat": (repeat, 1)}
    for name, (value, least) in smallest.items():
        if value < least:
            raise RequestError(f"--{name} must be at least {least}, found {value}")
    notes = []
    tokens = min(new_tokens, limits.capacity // 2)
    if tokens < 2:
        raise RequestError(f"a capacity of {limits.capacity} tokens is too small to measure")
    if tokens < new_tokens:
        notes.append(f"{tokens} new tokens instead of {new_tokens}: the capacity is {limits.capacity}")
    longest = limits.capacity - tokens
    if longest < max(PROMPTS):
        notes.append(f"prompts of at most {longest} tokens: the capacity is {limits.capacity}")
    rows = min(batch, limits.max_batch)
    if rows < batch:
        notes.append(f"{rows} rows instead of {batch}: the bundle was built for no more")
    prompts = tuple(dict.fromkeys(min(prompt, longest) for prompt in PROMPTS))
    return BenchPlan(prompts, rows, tokens, repeat, threads, tuple(notes))


def measure_elsewhere(request: Request) -> Reading:
    """`bench_worker.measure` in a process of its own.

    Raises:
        EngineError: it failed, or the process died; with its last words.
    """
    command = [sys.executable, "-m", "zonda.runtime.bench_worker"]
    result = subprocess.run(command, input=msgspec.json.encode(request), capture_output=True, check=False)
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip()[-2000:]
        raise EngineError(words if result.returncode == 1 else f"it died (exit status {result.returncode}): {words}")
    return msgspec.json.decode(result.stdout, type=Reading)


def bench(
    bundle: Bundle,
    targets: Sequence[Target],
    plan: BenchPlan,
    *,
    pick: bool = True,
    measure: Measure = measure_elsewhere,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measure `targets` in turns; pick, and remember the pick, if two or more of them are proven.

    Args:
        bundle: opened.
        targets: some of the bundle's; those that cannot run here are reported with the reason.
        plan: from `make_plan`.
        pick: False leaves what this host remembers as it is.
        measure: takes one reading.
        progress: called with what is measured next.
    """
    failures: dict[str, str] = {}
    readings: dict[str, list[Reading]] = {target.name: [] for target in targets}
    for target in targets:
        reason = obstacle(bundle, target, forced=True)
        if reason is not None:
            failures[target.name] = reason
    for number in range(plan.repeat):
        left = [target for target in targets if target.name not in failures]
        first = number % max(1, len(left))
        for target in left[first:] + left[:first]:
            progress(f"round {number + 1} of {plan.repeat}: {target.name}")
            request = Request(
                bundle=str(Path(bundle.path).absolute()),
                target=target.name,
                threads=plan.threads,
                cases=plan.cases,
                new_tokens=plan.new_tokens,
                seed=number,
            )
            try:
                readings[target.name].append(measure(request))
            except ZondaError as error:
                failures[target.name] = str(error)
    reports = [
        _unmeasured(bundle, target, failures[target.name])
        if target.name in failures
        else _report(bundle, target, plan, readings[target.name])
        for target in targets
    ]
    picked = _pick(bundle, targets, reports) if pick else ""
    return BenchReport(
        bundle=str(bundle.path),
        new_tokens=plan.new_tokens,
        repeat=plan.repeat,
        notes=plan.notes,
        targets=tuple(reports),
        picked=picked,
    )


def _pick(bundle: Bundle, targets: Sequence[Target], reports: Sequence[TargetReport]) -> str:
    """Remember the fastest of the proven targets; its name, empty if there are fewer than two."""
    request_s = {report.name: report.request_s for report in reports if report.proven and not report.failure}
    if len(request_s) < 2:
        return ""
    fastest = min(request_s, key=request_s.__getitem__)
    remember_pick(bundle, next(target for target in targets if target.name == fastest), request_s)
    return fastest


def _unmeasured(bundle: Bundle, target: Target, failure: str) -> TargetReport:
    proven = is_proven(bundle, target)
    return TargetReport(name=target.name, kind=target.kind, dtype=target.dtype, proven=proven, failure=failure)


def _report(bundle: Bundle, target: Target, plan: BenchPlan, readings: Sequence[Reading]) -> TargetReport:
    figures, requests = [], []
    for index, case in enumerate(plan.cases):
        timings = [reading.timings[index] for reading in readings]
        first = median(timing.first_token_s for timing in timings)
        step = median(timing.decode_s for timing in timings) / (plan.new_tokens - 1)
        if case.batch == 1:
            requests.append(first + REQUEST_TOKENS * step)
        figures.append(
            Figures(
                prompt_tokens=case.prompt_tokens,
                batch=case.batch,
                first_token_s=first,
                prefill_tokens_per_s=case.batch * case.prompt_tokens / first,
                decode_tokens_per_s=case.batch / step,
            )
        )
    return TargetReport(
        name=target.name,
        kind=target.kind,
        dtype=target.dtype,
        proven=is_proven(bundle, target),
        load_s=median(reading.load_s for reading in readings),
        peak_rss=max(reading.peak_rss for reading in readings),
        request_s=mean(requests),
        figures=tuple(figures),
        readings=tuple(readings),
    )
