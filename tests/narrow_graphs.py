"""The graph that TensorRT is given, stepped on the CPU in 16 bits and compared with the eager model in float32.

Tolerance, as a share of the largest |logit|: a logit of these two layers is the sum of some 60 roundings (weights,
activations, states) of at most half a unit u each, independent: √60 · u of its standard deviation, which is a third
of the largest logit; the worst of a few thousand lies 4.5 deviations out: 4.5 · √60 · u / 3 < 12 u.
"""

import ml_dtypes
import numpy as np
from support import TWO_LAYERS, Eager, run_scenario

from zonda.models.llama import Llama
from zonda.runtime import contract

ROWS = 40
TOLERANCE = 12
UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Graph:
    """An executor of steps over states that are passed by hand. run: inputs by name -> outputs in the graph's order."""

    def __init__(self, run, model: Llama, rows: int, dtype) -> None:
        self.run = run
        self.states = {}
        for layer, shape in enumerate(model.kv_shapes):
            for kind, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
                name = contract.state_names(layer, kind)[0]
                self.states[name] = np.zeros((rows, shape.num_key_value_heads, ROWS, dim), dtype)

    def step(self, ids, offsets, lens, positions):
        start = offsets[:, None].astype(np.int64) + np.arange(ids.shape[1])
        feed = dict(zip(contract.INPUTS, (ids, offsets, start, lens, positions), strict=True))
        logits, *presents = self.run(feed | self.states)
        self.states = dict(zip(self.states, presents, strict=True))
        assert logits.dtype == np.float32
        return logits


def feed_and_compare(executor, model, steps) -> float:
    """The largest error of a logit, as a share of the largest logit."""
    rows = len(steps[0])
    tokens = np.random.default_rng(7).integers(0, TWO_LAYERS.vocab_size, (rows, 32))
    wanted = run_scenario(Eager(model, rows, ROWS), tokens, steps)
    found = run_scenario(executor(rows), tokens, steps)
    largest = max(np.abs(row).max() for row in wanted if row.size)
    return max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True) if a.size) / largest
