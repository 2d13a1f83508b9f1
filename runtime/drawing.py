"""Finding the largest of many logits, and drawing an index by weight: exact, and with few passes over the vocabulary.

Between two steps numpy's code is no longer in the processor's caches, so few calls count for more than few operations.
Knows arrays; nothing of requests or sequences.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

_BLOCK = 256  # weights that are summed before the sums are accumulated: a running sum over all of them is 20× slower
_GROUP = 64  # logits that share a maximum in the search for the k largest
_UNIFORMS = 64  # random numbers that are drawn at once: a single one costs nearly as much
_ROUNDING = 2.0**-21  # more than subtracting and dividing in float32 can change a distance, relatively …
_TINY = 1e-39  # … and absolutely, for temperatures up to the highest
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def likeliest(logits: Logits, k: int) -> list[tuple[float, NDArray[np.int64] | None]]:
    """Of each row (V,) of logits (B, V): the largest, and ascending ids among which are all that top_k = k can keep.

    The k-th largest of the maxima of groups is no larger than the k-th largest of all: each maximum stands for one.
    So whatever is not below it is a candidate, hardly more than k of them. Temperature may make equals of two that are
    not, hence the slack. None is every id: k is too large for groups.
    """
    batch, vocab = logits.shape
    size = min(_GROUP, math.isqrt(vocab), vocab // (4 * k))
    if size < 2:
        return [(float(row.max()), None) for row in logits]
    count = vocab // size
    maxima = logits[:, : size * count].reshape(batch, size, count).max(axis=1)
    if rest := vocab - size * count:  # fewer than size, and so than count: they join the first groups
        np.maximum(maxima[:, :rest], logits[:, size * count :], out=maxima[:, :rest])
    top = np.partition(maxima, count - k, axis=1)[:, count - k :]
    highest = top.max(axis=1).tolist()
    bounds = [slightly_below(low, high - low) for low, high in zip(top[:, 0].tolist(), highest, strict=True)]
    if batch == 1:
        return [(highest[0], np.flatnonzero(logits[0] >= bounds[0]))]
    inside = np.flatnonzero(logits >= np.array(bounds, np.float32)[:, None])
    parts = np.split(inside, inside.searchsorted(np.arange(1, batch) * vocab))
    return [(high, part - row * vocab) for row, (high, part) in enumerate(zip(highest, parts, strict=True))]


def slightly_below(value: float, distance: float) -> float:
    """A bound for logits below all that float32 could take for `value`, which lies `distance` below the largest."""
    return max(value - distance * _ROUNDING - _TINY, -_FLOAT32_MAX)


def largest(values: Logits, k: int) -> NDArray[np.int64]:
    """Indices of the k largest values, and of all that equal the k-th, ascending."""
    return np.flatnonzero(values >= np.partition(values, -k)[-k])


def uniforms(random: np.random.Generator) -> Iterator[float]:
    """Endless random numbers in [0, 1)."""
    while True:
        yield from random.random(_UNIFORMS).tolist()


def draw_weighted(weights: Logits, top_p: float, randoms: Iterator[float]) -> int:
    """An index, drawn by weight from the nucleus: the fewest heaviest whose share reaches top_p.

    No sort: a draw from all weights is a draw from the nucleus if it lies inside, that is if what is heavier (of equal
    ones, what comes before) has a share below top_p. If it lies outside, so does all that is not heavier, and
    the next draw is among the heavier ones only. The expected number of draws is at most 1 + log(1 / top_p).
    """
    sums = _block_sums(weights)
    share = top_p * sums.item(-1)
    among: NDArray[np.int64] | None = None  # indices into weights; None is all
    while True:
        drawn = _draw_index(weights, sums, next(randoms))
        if top_p == 1:
            return drawn
        own = weights[drawn]
        heavier = weights > own
        heavier[:drawn] |= weights[:drawn] == own
        inside = np.flatnonzero(heavier)
        above = weights[inside]
        if not len(inside) or float(above.sum(dtype=np.float64)) < share:
            return drawn if among is None else int(among[drawn])
        among, weights, sums = inside if among is None else among[inside], above, _block_sums(above)


def _block_sums(weights: Logits) -> NDArray[np.float64]:
    """The running sum of the weights at the end of each block."""
    sums: NDArray[np.float64] = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    return sums


def _draw_index(weights: Logits, sums: NDArray[np.float64], uniform: float) -> int:
    """The index at which the running sum of the weights passes `uniform`, in [0, 1), of their total.

    Never one of weight 0: sums by block and one by one round differently, so targets are kept below the last sum.
    """
    total = sums.item(-1)
    target = min(uniform * total, math.nextafter(total, 0.0))
    block = int(sums.searchsorted(target, side="right"))
    start = block * _BLOCK
    inner = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    if block:
        target -= sums.item(block - 1)
    return start + int(inner.searchsorted(min(target, math.nextafter(inner.item(-1), 0.0)), side="right"))
