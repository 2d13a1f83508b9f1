"""Kernel of `AddRmsNorm`: the residual add and the norm of its result in one pass, one row a program.

Bytes moved: 4 * H elements a row (two read, two written; 32 KiB in 16 bits at H = 4096), where an add and a norm
apart move 5 * H; and the gain once from memory.

Registers a thread over all compute capabilities from 75 to 121, fp16 / fp32, by cuobjdump; nothing spills:

| H | 64 | 576 | 2048 | 4096 | 8192 | 16384 | 16383 |
|---|---|---|---|---|---|---|---|
| warps | 4 | 4 | 4 | 8 | 16 | 16 | 16 |
| registers | 19 / 20 | 34 / 38 | 47 / 50 | 48 / 51 | 49 / 54 | 81 / 89 | 118 / 128 |
"""

import triton
import triton.language as tl

from ..cubins import Variant
from .configuration import Configuration, Kernel, pointers, power_of_two, warps_for_row


@triton.jit
def add_rms_norm(x, residual, weight, y, total, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """`total = x + residual`; `y = total / sqrt(mean(total²) + eps) * weight`.

    The norm reads the sum as it is stored, rounded: fused and unfused graphs give the same numbers.
    x, residual, y, total: (rows, HIDDEN). weight: (HIDDEN,). eps: float32. Grid: rows.
    """
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    left = tl.load(x + start + column, mask, other=0.0).to(tl.float32)
    right = tl.load(residual + start + column, mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask, other=0.0).to(tl.float32)
    rounded = (left + right).to(total.dtype.element_ty)
    tl.store(total + start + column, rounded, mask)
    value = rounded.to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, 0), HIDDEN * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(y + start + column, (value * scale * gain).to(y.dtype.element_ty), mask)


def _configure(variant: Variant) -> Configuration:
    ((_, hidden),) = variant.sizes
    block = power_of_two(hidden)
    names = ("x", "residual", "weight", "y", "total")
    return Configuration(
        parameters=(*pointers(names, variant.dtypes), ("eps", "fp32")),
        constants=(("HIDDEN", hidden), ("BLOCK", block)),
        num_warps=warps_for_row(block),
    )


KERNEL = Kernel(add_rms_norm, _configure)
