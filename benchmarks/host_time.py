"""The host's time a decode step: what lies between two runs of the engine's session.

After a step's gigabyte of weights little of Python, of numpy or of the tokenizer is left in the processor's caches, so
what costs 10 µs in a loop of its own costs ten times as much here: only real steps of a real bundle show it. The time
is that from the end of one run to the beginning of the next: sampling, text, chunks, and the inputs of the next step.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {"temperature": 0.0}),
    "top-k 50, top-p 0.95": (1, SAMPLED),
    "top-p 0.95": (1, {"temperature": 0.8, "top_p": 0.95, "seed": 0}),
    "greedy, batch 8": (8, {"temperature": 0.0}),
    "top-k 50, top-p 0.95, batch 8": (8, SAMPLED),
}
"""Name -> rows, and what is asked of the sampler."""

PROMPT = "The wind comes down from the mountains, and"


class TimedSession:
    """Stands before a session; `host_s` are the times between its runs, `run_s` those of the runs."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self._left = time.perf_counter()
        self.host_s: list[float] = []
        self.run_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        """Run, and note when it began and ended; as little as can be after it, where it would count as the host's."""
        self.host_s.append(time.perf_counter() - self._left)
        entered = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self._left = time.perf_counter()
        self.run_s.append(self._left - entered)


@dataclass(frozen=True, slots=True)
class HostTime:
    """One case; seconds a step. quiet_s: a tenth of the steps took less, those that nothing else disturbed."""

    case: str
    steps: int
    median_s: float
    quiet_s: float
    run_s: float


def measure_host_time(bundle: Path, threads: int | None, tokens: int, rounds: int) -> list[HostTime]:
    """Decode `tokens` tokens a round in every case, the cases taking turns."""
    from zonda.runtime import Pipeline, SamplingParams

    host: dict[str, list[float]] = {name: [] for name in CASES}
    runs: dict[str, list[float]] = {name: [] for name in CASES}
    with Pipeline.load(bundle, threads=threads, target="onnxruntime") as pipeline:
        engine: Any = pipeline.engine
        for turn in range(rounds + 1):
            for name, (rows, options) in CASES.items():
                params = SamplingParams(max_tokens=tokens, ignore_eos=True, **options)
                timed = engine._sessions[0] = TimedSession(engine._sessions[0])  # that of decode steps
                pipeline.generate([PROMPT] * rows, params)
                engine._sessions[0] = timed.session
                if turn:  # the first warms up
                    # The last runs are the steps; the time before the first of them belongs to prefill.
                    host[name] += timed.host_s[2 - tokens :]
                    runs[name] += timed.run_s[1 - tokens :]
    return [
        HostTime(name, len(seen), median(seen), quantiles(seen, n=10)[0], median(runs[name]))
        for name, seen in host.items()
    ]


def table(found: list[HostTime]) -> Table:
    """For people: microseconds of the host, milliseconds of the session."""
    shown = Table(title="A decode step: the host's time between two runs of the session")
    shown.add_column("case", no_wrap=True)
    for title in ("steps", "median µs", "best tenth µs", "session ms"):
        shown.add_column(title, justify="right")
    for one in found:
        times = (f"{one.median_s * 1e6:.0f}", f"{one.quiet_s * 1e6:.0f}", f"{one.run_s * 1e3:.1f}")
        shown.add_row(one.case, str(one.steps), *times)
    return shown
