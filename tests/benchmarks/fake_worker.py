"""A runtime without a model, run as a worker's process: it continues a prompt by counting up from its last token.

Its argument is what it does wrong, if anything.
"""

import os
import sys
import time
from pathlib import Path

from benchmarks.worker import Generate, Meter, serve

SETUP_S, PREFILL_S, STEP_S = 0.02, 0.04, 0.01
FAULT = sys.argv[1] if len(sys.argv) > 1 else ""


def load(model: Path, threads: int) -> Generate:
    if FAULT == "cannot load":
        raise ValueError(f"{model} is not a model")

    def generate(prompt_ids: list[int], new_tokens: int, meter: Meter) -> None:
        if FAULT == "prints":
            os.system("echo a library that prints to stdout")
        if FAULT == "crashes":
            os.abort()
        time.sleep(SETUP_S)
        meter.ready()
        time.sleep(PREFILL_S)
        for n in range(1 if FAULT == "stops at eos" else new_tokens):
            if n:
                time.sleep(STEP_S)
            meter.token(prompt_ids[-1] + 1 + n)

    return generate


if __name__ == "__main__":
    serve(load)
