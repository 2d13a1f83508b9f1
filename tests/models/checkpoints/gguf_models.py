"""Running a small model of a GGUF file: the steps, what eager computes, and how large it gets."""

import numpy as np
import torch
from checkpoint_files import TOKENS
from support import Eager, run_scenario

from zonda.models import registry
from zonda.models.loading import load_weights

ROWS = 32
STEPS = [[7, 4], [1, 1], [3, 5]]
IDS = np.random.default_rng(0).integers(0, len(TOKENS), (2, 12))


def build(checkpoint):
    """The architecture's own module, on the meta device."""
    architecture = registry.of_config(checkpoint.config)
    with torch.device("meta"):
        return architecture.build(architecture.read_config(checkpoint.config), ROWS)


def dequantised_logits(checkpoint, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """Logits of the dequantised model, computed in `dtype`, row by row."""
    model = build(checkpoint).eval()
    load_weights(model, checkpoint)
    return run_scenario(Eager(model.to(dtype), 2, ROWS), IDS, STEPS)


def largest(rows) -> float:
    return max(np.abs(row).max() for row in rows)
