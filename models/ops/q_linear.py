"""Marker `QLinear`: a linear map whose weight is stored in blocks of small integers; see `blocks` for the formula."""

import torch
from torch import Tensor

from .blocks import dequantize
from .precision import widen

_TOGETHER = 1 << 22  # weights that are dequantised at once: a large head needs no float copy of itself


@torch.library.custom_op("zonda::q_linear", mutates_args=())
def q_linear(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:
    """`x @ dequantize(…).T`.

    Args:
        x: (..., K), floating; K is a multiple of block_size.
        codes: (N, K) uint8 for bits 8, (N, K/2) uint8 for bits 4 (see `blocks.pack`).
        scales: (N, K/block_size), floating.
        offsets: (N, K/block_size), floating, or None.
        bits: 4 or 8.
        block_size: weights that share a scale, along K.

    Returns:
        (..., N), dtype of x.
    """
    wide = widen(x)
    together = max(1, _TOGETHER // x.shape[-1])
    products = []
    for start in range(0, len(codes), together):
        rows = slice(start, start + together)
        shift = None if offsets is None else offsets[rows]
        weight = dequantize(codes[rows], scales[rows], shift, bits, block_size)
        products.append(wide @ weight.to(wide.dtype).T)
    return torch.cat(products, -1).to(x.dtype)


@q_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], codes.shape[0])
