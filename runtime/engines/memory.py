"""An engine double: same protocol, same guards, no model. Deterministic, so that what drives engines can be tested.

The cache of a row holds its token ids. The logits of a token are pseudo-random numbers seeded by every token up to
it, as they lie in the cache: a wrong offset, a wrong row or a stale prefix changes what is generated.
"""

import threading
import zlib

import numpy as np
from numpy.typing import NDArray

from ... import EngineError
from ..manifest import Limits
from . import Float32, Int32, Int64, KvCache, check_step


class MemoryKvCache:
    """Token ids of each row: (rows, capacity + max_chunk)."""

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.tokens = np.full((rows, length), -1, np.int64)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `KvCache`."""
        self.tokens[target, :length] = self.tokens[source, :length]

    def read(self, row: int, length: int) -> list[NDArray[np.floating]]:
        """The token ids, as one state tensor (1, length, 1)."""
        return [self.tokens[row, :length].astype(np.float64).reshape(1, length, 1)]


class MemoryEngine:
    """See `Engine`. `steps` records the shape (B, S, K) of every step, and `computed` counts valid tokens."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lock = threading.Lock()
        self.steps: list[tuple[int, int, int]] = []
        self.computed = 0
        self._closed = False

    def allocate(self, rows: int) -> MemoryKvCache:
        """See `Engine`."""
        return MemoryKvCache(rows, self.limits.capacity + self.limits.max_chunk)

    def step(
        self,
        cache: KvCache,
        first_row: int,
        input_ids: Int64,
        seqlen_offsets: Int32,
        input_lens: Int32,
        logit_positions: Int64,
    ) -> Float32:
        """See `Engine`."""
        if self._closed or not isinstance(cache, MemoryKvCache):
            raise EngineError("the engine is closed, or the cache belongs to another engine")
        check_step(self.limits, cache.rows, first_row, input_ids, seqlen_offsets, input_lens, logit_positions)
        self.steps.append((*input_ids.shape, logit_positions.shape[1]))
        self.computed += int(input_lens.sum())
        logits = np.zeros((*logit_positions.shape, self.limits.vocab_size), np.float32)
        for b, (offset, length) in enumerate(zip(seqlen_offsets.tolist(), input_lens.tolist(), strict=True)):
            row = cache.tokens[first_row + b]
            row[offset : offset + length] = input_ids[b, :length]
            for k, position in enumerate(logit_positions[b].tolist()):
                if position < length:
                    logits[b, k] = self.logits_after(row[: offset + position + 1])
        return logits

    def logits_after(self, token_ids: Int64) -> Float32:
        """The logits (V,) that follow a row of token ids."""
        seed = zlib.crc32(np.ascontiguousarray(token_ids, np.int64).tobytes())
        return np.random.default_rng(seed).normal(0, 3, self.limits.vocab_size).astype(np.float32)

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
