"""GGUF's block types as `BlockQuantized` has them: codes, scales and offsets of raw rows. Nothing is requantised.

Layouts: github.com/ggml-org/ggml, src/ggml-common.h and dequantize_row_* in src/ggml-quants.c. A scale is the block's
own fp16 number, or its product with a 6 or 8 bit sub-block scale: exact in float32. Codes are moved so that the middle
of their range is the zero point (integer activations then lose least), so a type with a minimum m gets the offset
`middle * scale + m`, rounded once to float32. Whatever has 5 or 6 bits goes into 8, and so does what means one of 16
numbers by a table, all of which are small integers; 2 and 3 bits go into 4. Types whose codes stand for several weights
at once (IQ1 to IQ3) or that share a scale among 256 (TQ) have no form.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from ..quantization import Form

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Parts = tuple[Bytes, Floats, Floats | None]
"""Of n blocks: unsigned codes (n, weights a block), scales (n, scales a block), minima like scales or None."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """One type. range_bits: of its codes. read: blocks (n, bytes a block) -> their parts."""

    form: Form
    range_bits: int
    read: Callable[[Bytes], Parts]


def form_of(kind: Type) -> Form | None:
    """The form that holds this type; None if none does."""
    layout = _LAYOUTS.get(kind)
    return None if layout is None else layout.form


def read_rows(rows: Bytes, kind: Type) -> Parts:
    """Translate raw rows of a type that `form_of` knows.

    Args:
        rows: (N, bytes a row).
        kind: the type.

    Returns:
        codes (N, K * bits / 8), scales (N, K / block_size), and offsets like scales or None, as of `BlockQuantized`.
    """
    layout = _LAYOUTS[kind]
    codes, scales, minima = layout.read(np.ascontiguousarray(rows).reshape(-1, GGML_QUANT_SIZES[kind][1]))
    middle = 1 << layout.range_bits - 1
    codes = codes + np.uint8((1 << layout.form.bits - 1) - middle)
    codes = codes[:, 0::2] | _high(codes[:, 1::2]) if layout.form.bits == 4 else codes
    offsets = None if minima is None else np.float32(middle) * scales + minima
    count = len(rows)
    return codes.reshape(count, -1), scales.reshape(count, -1), None if offsets is None else offsets.reshape(count, -1)


def _high(codes: Bytes) -> Bytes:
    """Into the high nibble."""
    shifted: Bytes = np.left_shift(codes, 4)
    return shifted


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 numbers at byte `start`: (n, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """Each `width` bytes hold 2 * width codes: all low nibbles, then all high ones."""
    groups = packed.reshape(len(packed), -1, width)
    return np.concatenate((groups & 0xF, groups >> 4), -1).reshape(len(packed), -1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """(n, 4) bytes -> (n, 32): bit i is the fifth of code i, in its place."""
    return _high(np.unpackbits(packed, axis=-1, bitorder="little"))


def _q4_0(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:] ^ np.uint8(0x80), _half(blocks, 0), None  # two's complement + 128


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """The 8 scales and 8 minima of a Q4_K or Q5_K block: fp16 numbers times 6-bit ones."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, third & 15 | first >> 2 & 48), -1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 2 & 48), -1)
    return _half(blocks, 0) * scales.astype(np.float32), -_half(blocks, 2) * minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    bits = np.arange(8, dtype=np.uint8)[:, None]  # bit j of byte i is the fifth of code 32 j + i
    fifth = _high(blocks[:, None, 16:48] >> bits & np.uint8(1))
    return _nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1), *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]  # of 4 groups of 32 codes, twice
    upper = _high(blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3))
    codes = _nibbles(blocks[:, :128], 64) | upper.reshape(len(blocks), -1)
    return codes, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _q2_k(blocks: Bytes) -> Parts:
    packed, scales = _pairs(blocks[:, 16:80]), blocks[:, :16]
    minima = -_half(blocks, 82) * (scales >> 4).astype(np.float32)
    return packed, _half(blocks, 80) * (scales & 15).astype(np.float32), minima


def _q3_k(blocks: Bytes) -> Parts:
    bits = np.arange(8, dtype=np.uint8)[:, None]  # bit j of byte i is the third of code 32 j + i
    third = blocks[:, None, :32] >> bits & np.uint8(1)
    codes = _pairs(blocks[:, 32:96]) | (third << np.uint8(2)).reshape(len(blocks), -1)
    low, high = _nibbles(blocks[:, 96:104], 8), _pairs(blocks[:, 104:108], 4)
    scales = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    return codes, _half(blocks, 108) * scales, None


def _iq4_nl(blocks: Bytes) -> Parts:
    return _IQ4[_nibbles(blocks[:, 2:], 16)], _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Parts:
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), -1).reshape(len(blocks), -1)
    high = blocks[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
    scales = (low | high.reshape(len(blocks), -1) << np.uint8(4)).astype(np.float32) - np.float32(32)
    return _IQ4[_nibbles(blocks[:, 8:], 16)], _half(blocks, 0) * scales, None


def _mxfp4(blocks: Bytes) -> Parts:
    """OCP Microscaling Formats 1.0, section 5: E2M1 numbers, here doubled, times a power of two, here halved."""
    exponents = blocks[:, :1].astype(np.int32)
    return _E2M1[_nibbles(blocks[:, 1:], 16)], np.ldexp(np.float32(1), exponents - 128), None


def _nvfp4(blocks: Bytes) -> Parts:
    """E2M1 numbers, here doubled, times an unsigned E4M3 one, here halved; 0x7F, its NaN, stands for zero in ggml."""
    numbers = blocks[:, :4].astype(np.int32)
    exponents, fractions = numbers >> 3 & 15, numbers & 7
    scales = np.ldexp((fractions + 8 * (exponents > 0)).astype(np.float32), np.maximum(exponents, 1) - 11)
    return _E2M1[_nibbles(blocks[:, 4:], 8)], np.where(numbers == 0x7F, np.float32(0), scales), None


def _pairs(packed: Bytes, width: int = 32) -> Bytes:
    """Each `width` bytes hold 4 * width codes of 2 bits: all lowest bits, then those above them."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes: Bytes = packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8(3)
    return codes.reshape(len(packed), -1)


def _table(*numbers: int) -> Bytes:
    """What a code of 4 bits means, as a code of 8 bits whose zero is 128."""
    return np.array([128 + number for number in numbers], np.uint8)


_IQ4 = _table(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = _table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_LAYOUTS = {
    Type.Q4_0: _Layout(Form(4, 32, offsets=False), 4, _q4_0),
    Type.Q4_1: _Layout(Form(4, 32, offsets=True), 4, _q4_1),
    Type.Q5_0: _Layout(Form(8, 32, offsets=False), 5, _q5_0),
    Type.Q5_1: _Layout(Form(8, 32, offsets=True), 5, _q5_1),
    Type.Q8_0: _Layout(Form(8, 32, offsets=False), 8, _q8_0),
    Type.Q4_K: _Layout(Form(4, 32, offsets=True), 4, _q4_k),
    Type.Q5_K: _Layout(Form(8, 32, offsets=True), 5, _q5_k),
    Type.Q6_K: _Layout(Form(8, 16, offsets=False), 6, _q6_k),
    Type.Q2_K: _Layout(Form(4, 16, offsets=True), 2, _q2_k),
    Type.Q3_K: _Layout(Form(4, 16, offsets=False), 3, _q3_k),
    Type.IQ4_NL: _Layout(Form(8, 32, offsets=False), 8, _iq4_nl),
    Type.IQ4_XS: _Layout(Form(8, 32, offsets=False), 8, _iq4_xs),
    Type.MXFP4: _Layout(Form(8, 32, offsets=False), 8, _mxfp4),
    Type.NVFP4: _Layout(Form(8, 16, offsets=False), 8, _nvfp4),
}
