"""Kernel of `RmsNorm`: one program holds ROWS whole rows in registers, so x is read once and y written once.

Bytes moved: 2 * H elements a row (16 KiB in 16 bits at H = 4096), and the gain once from memory; programs after the
first find it in the cache.

Registers a thread over all compute capabilities from 75 to 121, fp16 / fp32, by cuobjdump; nothing spills:

| H | 64 | 576 | 2048 | 4096 | 8192 | 16384 | 16383 |
|---|---|---|---|---|---|---|---|
| warps | 4 | 4 | 4 | 8 | 16 | 16 | 16 |
| registers | 27 / 27 | 31 / 33 | 48 / 47 | 48 / 48 | 49 / 51 | 85 / 85 | 99 / 120 |
"""

import triton
import triton.language as tl

from ..cubins import Variant
from .configuration import Configuration, Kernel, pointers, power_of_two, warps_for_row

_ELEMENTS = 512  # a program for short rows (the heads of a QK norm) takes several, to fill its warps


@triton.jit
def rms_norm(x, weight, y, eps, rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    """`y = x / sqrt(mean(x²) + eps) * weight` over rows of HIDDEN, in float32.

    x, y: (rows, HIDDEN). weight: (HIDDEN,). eps: float32. rows: int32. Grid: ceil(rows / ROWS).
    """
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = column < HIDDEN
    mask = (first + row < rows)[:, None] & within[None, :]
    start = first.to(tl.int64) * HIDDEN
    place = row[:, None] * HIDDEN + column[None, :]
    value = tl.load(x + start + place, mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, within, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, 1), HIDDEN * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(y + start + place, (value * scale[:, None] * gain[None, :]).to(y.dtype.element_ty), mask)


def _configure(variant: Variant) -> Configuration:
    ((_, hidden),) = variant.sizes
    block = power_of_two(hidden)
    return Configuration(
        parameters=(*pointers(("x", "weight", "y"), variant.dtypes), ("eps", "fp32"), ("rows", "i32")),
        constants=(("HIDDEN", hidden), ("BLOCK", block), ("ROWS", max(1, _ELEMENTS // block))),
        num_warps=warps_for_row(block),
    )


KERNEL = Kernel(rms_norm, _configure)
