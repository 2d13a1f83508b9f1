"""KV buffers in GPU memory: rows that a step finds by address, copied on the device, read to the host."""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import CapacityError, EngineError
from .cuda_memory import Device, aligned

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "int64": 8, "int32": 4, "bool": 1}
"""Bytes of an element."""


@dataclass(frozen=True, slots=True)
class StateLayout:
    """One state tensor of a row: names in the graph, and (heads, positions, dim) elements of dtype, contiguous.

    positions: C, what the graph was built for: capacity + max_chunk or more.
    """

    input: str
    output: str
    heads: int
    positions: int
    dim: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Of one position of one head."""
        return self.dim * ITEM_SIZES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Of all positions of one head."""
        return self.positions * self.token_bytes

    @property
    def row_bytes(self) -> int:
        """Of all heads."""
        return self.heads * self.head_bytes


class DeviceKvCache:
    """See `KvCache`: one allocation that holds a (rows, Hkv, C, D) buffer a state tensor, zeroed.

    The memory goes back when the cache is no longer referred to, or when the device is closed.
    """

    def __init__(self, device: Device, layouts: Sequence[StateLayout], rows: int) -> None:
        """Allocate.

        Raises:
            DeviceMemoryError: it does not fit; the message says what is needed and what is free.
        """
        sizes = [aligned(layout.row_bytes * rows) for layout in layouts]
        *places, total = itertools.accumulate(sizes, initial=0)
        with device.entered():
            base = device.allocate(
                total, f"a KV cache of {rows} rows", "load with a smaller max_batch, or build with a smaller --capacity"
            )
            weakref.finalize(self, device.discard, base)
            device.zero(base, total)
            device.synchronize()
        self.rows = rows
        self.device = device
        self.layouts = tuple(layouts)
        self.bindings: dict[tuple[int, int, int], Any] = {}  # an engine's own, by (first row, batch, session)
        self._bases = [base + place for place in places]
        self._addresses: dict[int, tuple[int, ...]] = {}

    def addresses(self, row: int) -> tuple[int, ...]:
        """Where a row begins in each state tensor, in the contract's order."""
        found = self._addresses.get(row)
        if found is None:
            pairs = zip(self._bases, self.layouts, strict=True)
            found = self._addresses[row] = tuple(base + row * layout.row_bytes for base, layout in pairs)
        return found

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `KvCache`. Ordered with the steps; the host does not wait."""
        self._check(source, length)
        self._check(target, length)
        if not length or source == target:
            return
        with self.device.entered():
            for layout, to, since in zip(self.layouts, self.addresses(target), self.addresses(source), strict=True):
                pitch, width = layout.head_bytes, length * layout.token_bytes
                self.device.copy_rows(to, pitch, since, pitch, width, layout.heads)

    def read(self, row: int, length: int) -> list[NDArray[Any]]:
        """See `KvCache`; bfloat16 comes as float32."""
        self._check(row, length)
        arrays = [
            np.empty((layout.heads, length, layout.dim), "uint16" if layout.dtype == "bfloat16" else layout.dtype)
            for layout in self.layouts
        ]
        with self.device.entered():
            for layout, array, since in zip(self.layouts, arrays, self.addresses(row), strict=True):
                width = length * layout.token_bytes
                if length:
                    to = array.ctypes.data
                    self.device.copy_rows(to, width, since, layout.head_bytes, width, layout.heads, to_host=True)
            self.device.synchronize()
        return [
            (array.astype(np.uint32) << 16).view(np.float32) if layout.dtype == "bfloat16" else array
            for layout, array in zip(self.layouts, arrays, strict=True)
        ]

    def _check(self, row: int, length: int) -> None:
        if not 0 <= row < self.rows:
            raise CapacityError(f"row {row} of a cache of {self.rows}")
        if not 0 <= length <= min(layout.positions for layout in self.layouts):
            raise EngineError(f"{length} tokens of a row that holds {self.layouts[0].positions}")
