"""The side of the comparison that runs inside each runtime's own process and interpreter: `python -m benchmarks.worker
genai`, driven over JSON lines on stdin and stdout.

| request | reply |
|---|---|
| `{"do": "load", "model": path, "threads": n}` | `load_s` |
| `{"do": "first", "prompt_ids": [...]}` | `token_ids`: the one that follows |
| `{"do": "run", "prompts": [[...], ...], "new_tokens": n, "wake_ids": [...]}` | what `Meter.reading` gives |
| `{"do": "score", "token_ids": [...], "file": path}` | `shape` of the logits, float32, that lie in the file then |
| `{"do": "memory"}` | `peak_rss_mb` |

What a runtime cannot do is answered by `{"unavailable": reason}`. A run begins with an untimed generation of two tokens
from `wake_ids`: the process has slept, and threads, caches and clock rates take some milliseconds to come back, which a
prefill of 30 ms would feel.

All clocks are read here, by the `Meter`, so every runtime is measured alike and none measures itself. Anything that
goes wrong ends the process with a traceback on stderr. Standard library only: it runs in every peer's interpreter.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UnavailableError


class Meter:
    """Times a batch from outside the runtime: the runtime says when it is ready and hands over each row's tokens."""

    def __init__(self, rows: int = 1) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(rows)]
        self._times: list[list[float]] = [[] for _ in range(rows)]
        self._requested = self._ready = self.now()

    def now(self) -> float:
        """The clock, for tokens that a runtime hands over later than they were known."""
        return time.perf_counter()

    def ready(self) -> None:
        """The state of this request (generator, KV cache) is allocated and prefill begins; optional.

        What was before counts as `setup_s`: it is part of the time to the first token, but not of the prefill speed.
        """
        self._ready = self.now()

    def token(self, token_id: int, row: int = 0, at: float | None = None) -> None:
        """One more token of a row is known, now or since `at`."""
        self._times[row].append(self.now() if at is None else at)
        self.token_ids[row].append(token_id)

    def reading(self) -> dict[str, Any]:
        """setup_s: request to ready. prefill_s: ready to the moment when every row has its first token. decode_s: from
        there to the last token, with `decoded_tokens` in all rows.
        """
        prefilled = max(times[0] for times in self._times)
        return {
            "setup_s": self._ready - self._requested,
            "prefill_s": prefilled - self._ready,
            "decode_s": max(times[-1] for times in self._times) - prefilled,
            "decoded_tokens": sum(time_ > prefilled for times in self._times for time_ in times),
            "token_ids": self.token_ids,
        }


Generate = Callable[[list[list[int]], int, Meter], None]
"""(prompts of one length, n, meter): greedily generate n tokens for each row, through end tokens, giving each to the
meter as it comes. UnavailableError: this runtime cannot run so many rows, or so long ones."""

Score = Callable[[list[int]], Any]
"""Token ids -> the logits after each, as a buffer (N, V) of float32 in C order, with its `shape`."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model. score: None where a runtime gives no logits but the last."""

    generate: Generate
    score: Score | None = None


Load = Callable[[Path, int], Runtime]
"""(model, threads) -> the loaded model; imports its runtime only when called."""


def serve(load: Load) -> None:
    """Answer requests until stdin ends because the other side is gone."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like to stdout, in C++ too: the protocol has a descriptor of its own
    runtime: Runtime | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            started = time.perf_counter()
            runtime = load(Path(request["model"]), request["threads"])
            reply = {"load_s": time.perf_counter() - started}
        elif runtime is None:
            raise RuntimeError(f"asked to {request['do']} before a model was loaded")
        else:
            try:
                reply = ANSWERS[request["do"]](runtime, request)
            except UnavailableError as reason:
                reply = {"unavailable": str(reason)}
        print(json.dumps(reply), file=replies, flush=True)


def _first(runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    meter = Meter()
    runtime.generate([request["prompt_ids"]], 1, meter)
    return {"token_ids": meter.token_ids[0]}


def _run(runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    runtime.generate([request["wake_ids"]], 2, Meter())
    new_tokens = request["new_tokens"]
    meter = Meter(len(request["prompts"]))
    runtime.generate(request["prompts"], new_tokens, meter)
    for row in meter.token_ids:
        if len(row) != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} tokens, got {len(row)}: it must not stop at end tokens")
    return meter.reading()


def _score(runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    if runtime.score is None:
        raise UnavailableError("it gives the logits of the last token only")
    logits = runtime.score(request["token_ids"])
    Path(request["file"]).write_bytes(memoryview(logits).cast("B"))
    return {"shape": list(logits.shape)}


def _memory(_: Runtime, __: dict[str, Any]) -> dict[str, Any]:
    """Peak of this program: Linux's ru_maxrss would begin with what the parent had when it forked."""
    if sys.platform == "darwin":
        return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}  # bytes there
    status = Path("/proc/self/status").read_text()
    return {"peak_rss_mb": int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6}


ANSWERS: dict[str, Callable[[Runtime, dict[str, Any]], dict[str, Any]]] = {
    "first": _first,
    "run": _run,
    "score": _score,
    "memory": _memory,
}


if __name__ == "__main__":
    serve(importlib.import_module(f"benchmarks.peers.{sys.argv[1]}").PEER.load)
