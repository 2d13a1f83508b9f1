"""Kernel of `RoPE`: q and k in one launch, one token a program; its row of the tables stays in registers.

Bytes moved: 2 * (Hq + Hkv) * D elements a token (20 KiB in 16 bits at 32 and 8 heads of 128), R * 4 bytes of tables
and 8 of position, each once. Pairs that lie side by side are loaded whole and split in registers.

Registers a thread over all compute capabilities from 75 to 121, 4 warps, fp16 / fp32, by cuobjdump; nothing spills:

| Hq, Hkv, D, R | 9, 3, 64, 64 | 32, 8, 128, 128 | 128, 8, 128, 128 | 32, 32, 80, 32 | 8, 8, 256, 256 |
|---|---|---|---|---|---|
| half-split | 34 / 38 | 48 / 56 | 48 / 62 | 38 / 50 | 48 / 53 |
| interleaved | 36 / 37 | 38 / 52 | 46 / 61 | 38 / 46 | 40 / 50 |
"""

import triton
import triton.language as tl

from ..cubins import Variant
from .configuration import Configuration, Kernel, pointers, power_of_two

_PAIRS = 1024  # of a tile of heads: 8 pairs a thread


@triton.jit
def _rotate(
    source,
    target,
    token,
    c,
    s,
    HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
):
    """Rotate the HEADS heads of one token. c, s: (1, BLOCK) float32, of which HALF count."""
    dtype = target.dtype.element_ty
    source += token.to(tl.int64) * (HEADS * DIM)
    target += token.to(tl.int64) * (HEADS * DIM)
    index = tl.arange(0, BLOCK)
    for start in tl.static_range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)
        present = (head < HEADS)[:, None]
        row = head[:, None] * DIM
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK)
            place = row + both[None, :]
            mask = present & (both < 2 * HALF)[None, :]
            value = tl.load(source + place, mask, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(value, (TILE, BLOCK, 2)))
            turned = tl.join(first * c - second * s, second * c + first * s)
            tl.store(target + place, tl.reshape(turned, (TILE, 2 * BLOCK)).to(dtype), mask)
        else:
            place = row + index[None, :]
            mask = present & (index < HALF)[None, :]
            first = tl.load(source + place, mask, other=0.0).to(tl.float32)
            second = tl.load(source + place + HALF, mask, other=0.0).to(tl.float32)
            tl.store(target + place, (first * c - second * s).to(dtype), mask)
            tl.store(target + place + HALF, (second * c + first * s).to(dtype), mask)
        if DIM > 2 * HALF:
            rest = tl.arange(0, REST)
            place = row + 2 * HALF + rest[None, :]
            mask = present & (rest < DIM - 2 * HALF)[None, :]
            tl.store(target + place, tl.load(source + place, mask), mask)


@triton.jit
def rope(
    q,
    k,
    cos,
    sin,
    positions,
    q_out,
    k_out,
    table_rows,
    HEADS: tl.constexpr,  # noqa: N803
    KEY_HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
):
    """Rotate the first 2 * HALF of each head's DIM dimensions by the table row at the token's position.

    q, q_out: (tokens, HEADS * DIM). k, k_out: (tokens, KEY_HEADS * DIM), absent if KEY_HEADS is 0. cos, sin:
    (table_rows, HALF) float32. positions: (tokens,) int64. table_rows: int32. Grid: tokens. A position outside
    the tables gives NaN, never a read outside them.
    """
    token = tl.program_id(0)
    position = tl.load(positions + token)
    index = tl.arange(0, BLOCK)
    entry = position * HALF + index
    mask = (index < HALF) & (entry >= 0) & (entry < table_rows.to(tl.int64) * HALF)
    c = tl.load(cos + entry, mask, other=float("nan"))[None, :]
    s = tl.load(sin + entry, mask, other=float("nan"))[None, :]
    _rotate(q, q_out, token, c, s, HEADS, DIM, HALF, BLOCK, REST, TILE, INTERLEAVED)
    if KEY_HEADS > 0:
        _rotate(k, k_out, token, c, s, KEY_HEADS, DIM, HALF, BLOCK, REST, TILE, INTERLEAVED)


def _configure(variant: Variant) -> Configuration:
    sizes = dict(variant.sizes)
    heads, key_heads, dim, half = (sizes[name] for name in ("heads", "key_heads", "dim", "half"))
    block = power_of_two(half)
    tile = min(power_of_two(max(heads, key_heads)), max(1, _PAIRS // block))
    names = ("q", "k", "cos", "sin", "positions", "q_out", "k_out")
    present = tuple(name for name in names if key_heads or name not in ("k", "k_out"))
    absent = tuple((name, None) for name in names if name not in present)
    return Configuration(
        parameters=(*pointers(present, variant.dtypes), ("table_rows", "i32")),
        constants=(
            *absent,
            ("HEADS", heads),
            ("KEY_HEADS", key_heads),
            ("DIM", dim),
            ("HALF", half),
            ("BLOCK", block),
            ("REST", power_of_two(max(1, dim - 2 * half))),
            ("TILE", tile),
            ("INTERLEAVED", sizes["interleaved"]),
        ),
        num_warps=4,
    )


KERNEL = Kernel(rope, _configure)
