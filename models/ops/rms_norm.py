"""Marker `RmsNorm`: root-mean-square normalisation with a gain (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

import torch
from torch import Tensor

from .precision import widen


@torch.library.custom_op("zonda::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x², -1) + eps) * weight`.

    Args:
        x: (..., H), floating.
        weight: (H,), floating: the gain.
        eps: added to the mean square, before the root.

    Returns:
        (..., H), dtype of x.
    """
    wide = widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)
