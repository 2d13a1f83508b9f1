"""A runtime without a model, run as a worker's process: it continues a prompt by counting up from its last token.

Its argument is what it does wrong, or cannot do, if anything.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import UnavailableError
from benchmarks.worker import Meter, Runtime, serve

SETUP_S, PREFILL_S, STEP_S = 0.02, 0.04, 0.01
VOCAB = 11
FAULT = sys.argv[1] if len(sys.argv) > 1 else ""


def load(model: Path, threads: int) -> Runtime:
    if FAULT == "cannot load":
        raise ValueError(f"{model} is not a model")

    def generate(prompts: list[list[int]], new_tokens: int, meter: Meter) -> None:
        if FAULT == "prints":
            os.system("echo a library that prints to stdout")
        if FAULT == "crashes" and len(prompts[0]) != 8:  # not at its first token
            os.abort()
        if FAULT == "one row" and len(prompts) > 1:
            raise UnavailableError("it takes one row")
        time.sleep(SETUP_S)
        meter.ready()
        time.sleep(PREFILL_S)
        for n in range(1 if FAULT == "stops at eos" else new_tokens):
            if n:
                time.sleep(STEP_S)
            for row, prompt in enumerate(prompts):
                meter.token(prompt[-1] + 1 + n, row)

    def score(token_ids: list[int]) -> np.ndarray:
        """The token that follows is the likelier the surer it is: 3 times as likely as any other, or 1."""
        logits = np.zeros((len(token_ids), VOCAB), np.float32)
        if FAULT != "knows nothing":
            logits[np.arange(len(token_ids) - 1), token_ids[1:]] = np.log(3)
        return logits

    return Runtime(generate, None if FAULT == "no logits" else score)


if __name__ == "__main__":
    serve(load)
