"""What the keys and values of a model look like: the eager model over texts of many kinds.

The texts are fixed, so that a build can be repeated. Each paragraph is a row of its own: the first token of a row,
which attention falls back on, has keys and values unlike any other's, and there must be more than a few of it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ..models.architecture import CausalModel
from ..runtime.manifest import Limits
from .proof import feed_eager, golden_prompts, padded

_TEXT = Path(__file__).with_name("calibration.txt")
_LONGEST = 128


def calibration_prompts(tokenizer: Tokenizer, limits: Limits) -> list[NDArray[np.int64]]:
    """Token ids of the golden prompts and of each paragraph of the calibration text, in rows of at most 128 tokens."""
    longest = min(_LONGEST, limits.capacity)
    rows = golden_prompts(tokenizer, limits)
    for paragraph in _TEXT.read_text("utf-8").split("\n\n"):
        ids = np.array(tokenizer.encode(paragraph).ids, np.int64) % limits.vocab_size
        rows += [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return rows


def eager_states(
    module: CausalModel, load: Callable[[str], Tensor], prompts: list[NDArray[np.int64]]
) -> list[list[NDArray[np.float32]]]:
    """What the eager model caches of each prompt: its state tensors (Hkv, length, D), in the contract's order."""
    ids, lens = padded(prompts)
    return feed_eager(module, load, ids, lens, lens[:, None].astype(np.int64) - 1)[1]
