"""Marker `QRmsNorm`: `RmsNorm` whose gain is stored quantised, as it lies in a quantised checkpoint.

The normalisation itself is float mathematics; only the gain is dequantised. (Quantising the output is another
operation and would bear another name.)
"""

import torch
from torch import Tensor

from .precision import widen
from .rms_norm import rms_norm


@torch.library.custom_op("zonda::q_rms_norm", mutates_args=())
def q_rms_norm(x: Tensor, codes: Tensor, scales: Tensor, eps: float) -> Tensor:
    """RmsNorm with the gain `(codes * scales[:, None]).flatten()`.

    Args:
        x: (..., H), floating, H = blocks * block_size.
        codes: (blocks, block_size) int8.
        scales: (blocks,), floating: one scale a block.
        eps: added to the mean square, before the root.

    Returns:
        (..., H), dtype of x.
    """
    wide = widen(scales)
    gain = (codes.to(wide.dtype) * wide[:, None]).flatten()
    return rms_norm(x, gain, eps)


@q_rms_norm.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)
