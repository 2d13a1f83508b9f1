"""Kernel of `QRmsNorm`: the gain is dequantised in registers and never written, one row a program.

Bytes moved: 2 * H elements a row, and once from memory H bytes of codes and H / GROUP scales: with fp16 scales and
groups of 32, 53 % of the bytes of an fp16 gain.

Registers a thread over all compute capabilities from 75 to 121, fp16 / fp32, by cuobjdump; nothing spills:

| H | 64 | 576 | 2048 | 4096 | 8192 | 16384 | 16383 |
|---|---|---|---|---|---|---|---|
| warps | 4 | 4 | 4 | 8 | 16 | 16 | 16 |
| registers | 23 / 23 | 39 / 40 | 63 / 59 | 63 / 63 | 63 / 62 | 95 / 112 | 128 / 128 |
"""

import triton
import triton.language as tl

from ..cubins import Variant
from .configuration import Configuration, Kernel, pointers, power_of_two, warps_for_row


@triton.jit
def q_rms_norm(x, codes, scales, y, eps, HIDDEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """`y = x / sqrt(mean(x²) + eps) * (codes * scales[index // GROUP])`.

    x, y: (rows, HIDDEN). codes: (HIDDEN,) int8. scales: (HIDDEN / GROUP,). eps: float32. Grid: rows.
    """
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    value = tl.load(x + start + column, mask, other=0.0).to(tl.float32)
    code = tl.load(codes + column, mask, other=0).to(tl.float32)
    step = tl.load(scales + column // GROUP, mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, 0), HIDDEN * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(y + start + column, (value * scale * (code * step)).to(y.dtype.element_ty), mask)


def _configure(variant: Variant) -> Configuration:
    (_, hidden), (_, group) = variant.sizes
    block = power_of_two(hidden)
    return Configuration(
        parameters=(*pointers(("x", "codes", "scales", "y"), variant.dtypes), ("eps", "fp32")),
        constants=(("HIDDEN", hidden), ("GROUP", group), ("BLOCK", block)),
        num_warps=warps_for_row(block),
    )


KERNEL = Kernel(q_rms_norm, _configure)
