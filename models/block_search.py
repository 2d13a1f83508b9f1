"""Quantising a float weight in blocks: the scale and offset of each block that leave the least weighted error.

    minimise over s, o and codes c      sum over the block of  v[k] * (w[k] - (c[k] * s + o)) ** 2

Rounding to nearest spreads the codes from the least weight of a block to its largest. The search begins there and at
ranges that are a little narrower or wider at either end, and lets each descend: codes by rounding, then s and o by
weighted least squares, in turn. The best is kept. That is the way of llama.cpp's `make_qkx3_quants`
(github.com/ggml-org/ggml, src/ggml-quants.c), with more beginnings and without its bounds on the minimum. The
importance v is computed from the weight alone, so no calibration data is needed.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .ops.blocks import pack
from .quantization import BlockQuantized, Form

_ENDS = (-0.04, 0.0, 0.04, 0.08)
"""By how much of a block's range either end is moved inwards."""
_DESCENTS = 3
"""Of the best beginning, after one of each."""
_TOGETHER = 30_000
"""Weights that are searched at once: they stay in a core's cache, and torch shares no operation that small among cores,
which would cost more than it brings."""
_WHOLE = 3.0 * 2**22
"""Added to a small float32 and taken away again, it rounds to the nearest whole number, half to even. `torch.round`
would do, but shares even 3,000 numbers among cores."""

Line = tuple[Tensor, Tensor]
"""Scales and offsets of n blocks, (n,) each."""


def importance(weight: Tensor) -> Tensor:
    """What an error of each weight counts for: the root mean square of its row, plus its magnitude; (N, K) float32."""
    weight = weight.float()
    return weight.square().mean(-1, keepdim=True).sqrt() + weight.abs()


def quantize(weight: Tensor, form: Form) -> BlockQuantized:
    """Search every block.

    Args:
        weight: (N, K) floating, K a multiple of the block size.
        form: how to hold it.

    Returns:
        The weight in blocks; its weighted error is nowhere larger than that of rounding to nearest. A weight that is
        not a finite number makes the scale or the offset of its block one that is not.
    """
    rows, columns = weight.shape
    blocks = columns // form.block_size
    codes = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8)
    scales, offsets = torch.empty(rows, blocks), torch.empty(rows, blocks) if form.offsets else None
    together = max(1, _TOGETHER // columns)
    for start in range(0, rows, together):
        part = slice(start, start + together)
        floats = weight[part].float()
        x, v = (t.unflatten(-1, (blocks, -1)).flatten(0, 1).T.contiguous() for t in (floats, importance(floats)))
        found, scale, offset = _search(x, v, form)
        codes[part] = pack((found + (1 << form.bits - 1)).to(torch.uint8).T.reshape(-1, columns), form.bits)
        scales[part] = scale.view(-1, blocks)
        if offsets is not None:
            offsets[part] = offset.view(-1, blocks)
    return BlockQuantized(form.bits, form.block_size, codes, scales, offsets)


def relative_error(weight: Tensor, blocks: BlockQuantized) -> float:
    """Root of the weighted square error of `blocks` over the weighted square of `weight` (N, K); 0 if that is zero."""
    floats, v = weight.float(), importance(weight)
    error, whole = ((v * t.square()).sum(dtype=torch.float64) for t in (floats - blocks.dequantize(), floats))
    return float((error / whole).sqrt()) if whole > 0 else 0.0


def _search(x: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks in columns, x and v (block, n) -> codes (block, n) around zero, scales (n,), offsets (n,)."""
    low, high = x.amin(0), x.amax(0)
    centre = (low + high) / 2 if form.offsets else torch.zeros_like(low)
    x, half = x - centre, (high - low) / 2  # centred, or least squares would cancel where a block lies far from zero
    peak = half if form.offsets else torch.maximum(-low, high)
    best = _spread(-peak, peak, form)
    error = _error(x, v, *best, form)
    for begin in _beginnings(peak, form):
        best, error = _better(best, error, _descend(x, v, *begin, form), x, v, form)
    found = best
    for _ in range(_DESCENTS):
        found = _descend(x, v, *found, form)
    (scale, offset), _ = _better(best, error, found, x, v, form)
    return _codes(x, scale, offset, form), scale, offset + centre


def _better(best: Line, error: Tensor, found: Line, x: Tensor, v: Tensor, form: Form) -> tuple[Line, Tensor]:
    """Of each block what leaves less: `best`, whose error is known, or `found`; and the error that it leaves."""
    left = _error(x, v, *found, form)
    less = left < error
    scale, offset = (torch.where(less, new, old) for new, old in zip(found, best, strict=True))
    return (scale, offset), torch.where(less, left, error)


def _beginnings(peak: Tensor, form: Form) -> Iterator[Line]:
    """Where to descend from, of blocks within -peak and peak."""
    if not form.offsets:
        yield from (_spread(-peak * (1 - end), peak * (1 - end), form) for end in _ENDS)
        return
    for first, last in itertools.product(_ENDS, repeat=2):
        yield _spread(-peak * (1 - 2 * first), peak * (1 - 2 * last), form)


def _spread(low: Tensor, high: Tensor, form: Form) -> Line:
    """With what the codes reach from `low` to `high`, evenly around 0 if there is none."""
    middle = 1 << form.bits - 1
    if not form.offsets:
        return high / (middle - 1), torch.zeros_like(high)
    scale = (high - low) / (2 * middle - 1)
    return scale, low + middle * scale


def _descend(x: Tensor, v: Tensor, scale: Tensor, offset: Tensor, form: Form) -> Line:
    """Codes by rounding, then scale and offset by weighted least squares: neither makes the error larger."""
    codes = _codes(x, scale, offset, form)
    products = v * codes
    code_code, code_x = (products * codes).sum(0), (products * x).sum(0)
    if not form.offsets:
        return _ratio(code_x, code_code, scale), offset
    one, code, x_one = v.sum(0), products.sum(0), (v * x).sum(0)
    scale = _ratio(one * code_x - code * x_one, one * code_code - code * code, scale)
    return scale, (x_one - scale * code) / one


def _codes(x: Tensor, scale: Tensor, offset: Tensor, form: Form) -> Tensor:
    """(block, n), whole numbers in floats, from -2 ** (bits - 1) on; 0 where the scale is too small to divide by."""
    middle = 1 << form.bits - 1
    inverse = _ratio(torch.ones_like(scale), scale, torch.zeros_like(scale))
    codes = torch.addcmul(-offset * inverse, x, inverse).clamp_(-middle, middle - 1)
    return codes.add_(_WHOLE).sub_(_WHOLE)


def _error(x: Tensor, v: Tensor, scale: Tensor, offset: Tensor, form: Form) -> Tensor:
    """(n,)."""
    return (torch.addcmul(offset, _codes(x, scale, offset, form), scale) - x).square_().mul_(v).sum(0)


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """The quotient where the denominator is a normal number above zero."""
    fits = denominator >= torch.finfo(denominator.dtype).tiny
    return torch.where(fits, numerator / torch.where(fits, denominator, 1), otherwise)
