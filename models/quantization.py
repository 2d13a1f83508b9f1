"""Block-quantised weights: the one representation, from checkpoint to engine.

Knows neither where blocks come from (`checkpoints/gguf_blocks.py`) nor which modules hold them (`quantize.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.blocks import dequantize


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored. bits: of a code, 4 or 8. block_size: weights that share a scale. offsets: has it any."""

    bits: int
    block_size: int
    offsets: bool

    @property
    def fits_norms(self) -> bool:
        """Whether a `QRmsNorm` can hold a gain of this form."""
        return self.bits == 8 and not self.offsets

    def __str__(self) -> str:
        """`4 bits, blocks of 32, offsets`."""
        return f"{self.bits} bits, blocks of {self.block_size}" + (", offsets" if self.offsets else "")


@dataclass(frozen=True, slots=True)
class Gain:
    """A vector (H,) as `QRmsNorm` holds it: codes (H / block, block) int8, scales (H / block,) float32."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class BlockQuantized:
    """A weight (N, K), or a vector (K,), in blocks along K: `(codes - 2 ** (bits - 1)) * scales + offsets`.

    bits: 4 or 8. block_size: weights that share a scale, a divisor of K.
    codes: (N, K * bits / 8) uint8; 4-bit codes lie two a byte, the first in the low nibble.
    scales: (N, K / block_size) float32. offsets: the same, or None. A vector's have no N.
    """

    bits: int
    block_size: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    @property
    def form(self) -> Form:
        """What a module that holds this weight is made for."""
        return Form(self.bits, self.block_size, self.offsets is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (K,)."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits

    def dequantize(self) -> Tensor:
        """The weight (N, K) or (K,), float32."""
        return dequantize(self.codes, self.scales, self.offsets, self.bits, self.block_size)

    def as_gain(self) -> Gain:
        """A vector of 8 bits without offsets in the form of a norm's gain; the same numbers."""
        signed = (self.codes ^ 0x80).view(torch.int8)  # unsigned - 128 in two's complement
        return Gain(signed.reshape(-1, self.block_size), self.scales)
