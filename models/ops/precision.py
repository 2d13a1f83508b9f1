"""The one precision rule of the reference mathematics: never below float32, float64 stays float64."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return `x` as float64 if it is float64, else as float32."""
    return x if x.dtype == torch.float64 else x.float()
