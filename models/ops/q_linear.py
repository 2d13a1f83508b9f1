"""Marker `QLinear`: a linear map whose weight is stored in blocks of small integers.

`w[n, k] = codes[n, k] * scales[n, k // block_size] + offsets[n, k // block_size]` with signed codes of 4 or 8 bits:
the form into which symmetric (no offsets) and asymmetric block formats go without loss.
"""

import torch
from torch import Tensor

from .precision import widen


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Return (N, K) int8 codes of packed storage.

    Args:
        codes: bits 8: (N, K) int8. bits 4: (N, K/2) uint8, two's-complement nibbles, the low one first
            (the layout of an ONNX INT4 tensor).
        bits: 4 or 8.
    """
    if bits == 8:
        return codes
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2).to(torch.int8)
    return (nibbles ^ 8) - 8


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:
    """Return the (N, K) weight, float32 (float64 if scales are); arguments as of `q_linear`."""
    wide = widen(scales)
    blocks = unpack(codes, bits).to(wide.dtype).unflatten(-1, (-1, block_size))  # (N, K/block, block)
    weight = blocks * wide[..., None]
    if offsets is not None:
        weight = weight + widen(offsets)[..., None]
    return weight.flatten(-2)


@torch.library.custom_op("zonda::q_linear", mutates_args=())
def q_linear(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:
    """`x @ dequantize(…).T`.

    Args:
        x: (..., K), floating; K is a multiple of block_size.
        codes: (N, K) int8 for bits 8, (N, K/2) uint8 for bits 4 (see `unpack`).
        scales: (N, K/block_size), floating.
        offsets: (N, K/block_size), floating, or None.
        bits: 4 or 8.
        block_size: weights that share a scale, along K.

    Returns:
        (..., N), dtype of x.
    """
    weight = dequantize(codes, scales, offsets, bits, block_size)
    wide = widen(x)
    return (wide @ weight.to(wide.dtype).T).to(x.dtype)


@q_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], codes.shape[0])
