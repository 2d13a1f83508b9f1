"""Block-quantised weights: the one representation, from checkpoint to engine.

Knows neither where blocks come from (`checkpoints/gguf_blocks.py`) nor which modules hold them (`quantize.py`).
"""

from dataclasses import dataclass

from torch import Tensor

from .ops.blocks import dequantize


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored. bits: of a code, 4 or 8. block_size: weights that share a scale. offsets: has it any."""

    bits: int
    block_size: int
    offsets: bool

    def __str__(self) -> str:
        """`4 bits, blocks of 32, offsets`."""
        return f"{self.bits} bits, blocks of {self.block_size}" + (", offsets" if self.offsets else "")


@dataclass(frozen=True, slots=True)
class BlockQuantized:
    """A weight (N, K) in blocks along K: `(codes - 2 ** (bits - 1)) * scales + offsets`.

    bits: 4 or 8. block_size: weights that share a scale, a divisor of K.
    codes: (N, K * bits / 8) uint8; 4-bit codes lie two a byte, the first in the low nibble.
    scales: (N, K / block_size) float32. offsets: the same, or None.
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
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def dequantize(self) -> Tensor:
        """The weight (N, K), float32."""
        return dequantize(self.codes, self.scales, self.offsets, self.bits, self.block_size)
