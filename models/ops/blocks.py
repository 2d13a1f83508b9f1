"""The mathematics of block-quantised weights that the markers share: packed codes to floats.

`w[n, k] = (codes[n, k] - zero) * scales[n, k // block_size] + offsets[n, k // block_size]` with unsigned codes and
`zero = 2 ** (bits - 1)`, the middle of their range. The bytes are those of ONNX Runtime's MatMulNBits and
GatherBlockQuantized with their default zero point.
"""

import torch
from torch import Tensor

from .precision import widen


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return (…, K * bits / 8) uint8, several codes a byte, the first in the low bits; the inverse of `unpack`.

    Args:
        codes: (…, K) uint8, each below 2 ** bits.
        bits: 4 or 8.
    """
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Return the (…, K) uint8 codes of packed storage, (…, K * bits / 8) uint8."""
    return codes if bits == 8 else torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int) -> Tensor:
    """Return the (…, K) weights, float32 (float64 if scales are).

    Args:
        codes: (…, K * bits / 8) uint8, see `pack`.
        scales: (…, K / block_size), floating.
        offsets: like scales, or None.
        bits: 4 or 8.
        block_size: weights that share a scale.
    """
    wide = widen(scales)
    blocks = unpack(codes, bits).to(wide.dtype).unflatten(-1, (-1, block_size))  # (…, K / block, block)
    weight = (blocks - (1 << bits - 1)) * wide[..., None]
    if offsets is not None:
        weight = weight + widen(offsets)[..., None]
    return weight.flatten(-2)
