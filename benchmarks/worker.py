"""The side of the comparison that runs inside each runtime's own process and interpreter: `python -m benchmarks.worker
genai`, driven over JSON lines on stdin and stdout.

| request | reply |
|---|---|
| `{"do": "load", "model": path, "threads": n}` | `load_s` |
| `{"do": "run", "prompt_ids": [...], "new_tokens": n, "wake_ids": [...]}` | what `Meter.reading` gives |
| `{"do": "close"}` | `peak_rss_mb`; the process ends |

A run begins with an untimed generation of two tokens from `wake_ids`: the process has slept, and threads, caches and
clock rates take some milliseconds to come back, which a prefill of 30 ms would feel.

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
from pathlib import Path
from typing import Any


class Meter:
    """Times one generation from outside the runtime: the runtime says when it is ready and hands over each token."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._requested = self._ready = time.perf_counter()
        self._first = self._last = 0.0

    def ready(self) -> None:
        """The state of this request (generator, KV cache) is allocated and prefill begins; optional.

        What was before counts as `setup_s`: it is part of the time to the first token, but not of the prefill speed.
        """
        self._ready = time.perf_counter()

    def token(self, token_id: int) -> None:
        """One more token is known."""
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(token_id)

    def reading(self) -> dict[str, Any]:
        """setup_s: request to ready. prefill_s: ready to first token. decode_s: first token to last."""
        return {
            "setup_s": self._ready - self._requested,
            "prefill_s": self._first - self._ready,
            "decode_s": self._last - self._first,
            "token_ids": self.token_ids,
        }


Generate = Callable[[list[int], int, Meter], None]
"""(prompt ids, n, meter): greedily generate n tokens, through end tokens, giving each to the meter as it comes."""

Load = Callable[[Path, int], Generate]
"""(model, threads) -> a generate function of a loaded model; imports its runtime only when called."""


def serve(load: Load) -> None:
    """Answer requests until `close`, or until stdin ends because the other side is gone."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like to stdout, in C++ too: the protocol has a descriptor of its own
    generate: Generate | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            started = time.perf_counter()
            generate = load(Path(request["model"]), request["threads"])
            reply = {"load_s": time.perf_counter() - started}
        elif request["do"] == "run":
            if generate is None:
                raise RuntimeError("asked to run before a model was loaded")
            reply = _run(generate, request)
        elif request["do"] == "close":
            reply = {"peak_rss_mb": _peak_rss_mb()}
        else:
            raise RuntimeError(f"unknown request {request['do']!r}")
        print(json.dumps(reply), file=replies, flush=True)
        if request["do"] == "close":
            return


def _run(generate: Generate, request: dict[str, Any]) -> dict[str, Any]:
    generate(request["wake_ids"], 2, Meter())
    new_tokens = request["new_tokens"]
    meter = Meter()
    generate(request["prompt_ids"], new_tokens, meter)
    if len(meter.token_ids) != new_tokens:
        raise RuntimeError(f"asked for {new_tokens} tokens, got {len(meter.token_ids)}: it must not stop at end tokens")
    return meter.reading()


def _peak_rss_mb() -> float:
    """Peak of this program: Linux's ru_maxrss would begin with what the parent had when it forked."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    serve(importlib.import_module(f"benchmarks.peers.{sys.argv[1]}").PEER.load)
