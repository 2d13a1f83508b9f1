"""Engines: what executes a bundle's graphs, one file a target, all behind one protocol.

An engine knows token ids, rows of a KV cache and logits. It knows nothing of text, sampling or scheduling.
"""

import operator
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ... import CapacityError, EngineError
from ..manifest import Limits

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class KvCache(Protocol):
    """KV buffers of a number of rows, owned by one caller; rows are contiguous and zeroed when they are allocated."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row into another."""

    def read(self, row: int, length: int) -> Sequence[NDArray[np.floating]]:
        """The first `length` tokens of a row: an array (Hkv, length, D) a state tensor, in the contract's order."""


class Engine(Protocol):
    """Executes steps.

    Thread safety: a step writes the engine's own input and logits buffers, so whoever calls `step` holds `lock`
    until it has read the logits.
    """

    limits: Limits
    lock: threading.Lock

    def allocate(self, rows: int) -> KvCache:
        """Allocate zeroed KV buffers for `rows` rows of `limits.capacity` tokens."""

    def step(
        self,
        cache: KvCache,
        first_row: int,
        input_ids: Int64,
        seqlen_offsets: Int32,
        input_lens: Int32,
        logit_positions: Int64,
    ) -> Float32:
        """Run new tokens of rows first_row … first_row + B - 1; their keys and values go into `cache`.

        Args:
            cache: from `allocate`.
            first_row: the first of B neighbouring rows.
            input_ids: (B, S) right-padded new tokens.
            seqlen_offsets: (B,) tokens already cached in each row.
            input_lens: (B,) valid tokens of each row of input_ids; 0 leaves the row alone.
            logit_positions: (B, K) which of the S tokens want logits, in [0, S).

        Returns:
            (B, K, V): a view of the engine's own buffer, valid until the next step.

        Raises:
            CapacityError: a row would grow beyond capacity, or S is greater than max_chunk.
            EngineError: shapes that do not fit, or the runtime failed.
        """

    def close(self) -> None:
        """Release what the engine holds; a later `step` raises `EngineError`."""


def check_step(
    limits: Limits, rows: int, first_row: int, input_ids: Int64, offsets: Int32, lens: Int32, positions: Int64
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Raise unless the arguments of `Engine.step` obey the contract; engines call it before they touch anything.

    Returns:
        input_ids, offsets, lens and positions as flat lists: of a few numbers they are the cheapest form.

    Raises:
        CapacityError: a row would grow beyond capacity, or S is greater than max_chunk.
        EngineError: any other breach.
    """
    if input_ids.shape == positions.shape == (1, 1) and offsets.shape == lens.shape == (1,):
        # Decoding one row is the step that comes most often; whatever is not in order here is named below.
        token, offset = input_ids.item(), offsets.item()
        ordinary = lens.item() == 1 and positions.item() == 0 and 0 <= first_row < rows
        if ordinary and 0 <= token < limits.vocab_size and 0 <= offset < limits.capacity:
            return [token], [offset], [1], [0]
    if input_ids.ndim != 2 or positions.ndim != 2:
        raise EngineError("input_ids must be (B, S) and logit_positions (B, K)")
    batch, length = input_ids.shape
    if not batch or not length or not positions.shape[1] or positions.shape[0] != batch:
        raise EngineError(f"empty or uneven step: input_ids {input_ids.shape}, logit_positions {positions.shape}")
    if positions.shape[1] > length:
        raise EngineError(f"{positions.shape[1]} logit positions for {length} tokens; at most one a token")
    if offsets.shape != (batch,) or lens.shape != (batch,):
        raise EngineError(f"seqlen_offsets and input_lens must be ({batch},), found {offsets.shape}, {lens.shape}")
    if first_row < 0 or first_row + batch > rows:
        raise CapacityError(f"rows {first_row}..{first_row + batch - 1} of a cache of {rows}")
    if length > limits.max_chunk:
        raise CapacityError(f"{length} new tokens a row in one step, the engine takes {limits.max_chunk}")
    # Lists, because numpy's reductions of a few numbers cost more than a decode step has to spare.
    cached, new = offsets.tolist(), lens.tolist()
    if min(cached) < 0 or min(new) < 0 or max(new) > length:
        raise EngineError("seqlen_offsets must not be negative, input_lens must lie in [0, S]")
    longest = max(map(operator.add, cached, new))
    if longest > limits.capacity:
        raise CapacityError(f"a row would hold {longest} tokens, the capacity is {limits.capacity}")
    wanted, tokens = positions.ravel().tolist(), input_ids.ravel().tolist()
    if min(wanted) < 0 or max(wanted) >= length:
        raise EngineError(f"logit_positions must lie in [0, {length})")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        raise EngineError(f"input_ids must lie in [0, {limits.vocab_size})")
    return tokens, cached, new, wanted
