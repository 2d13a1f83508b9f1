"""The inputs and logits of steps, in host memory that the GPU reads and in GPU memory, at fixed places a step shape.

A step's inputs are packed, so one copy brings them all; of the logits only those that were asked for come back.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import contract
from ..manifest import Limits
from . import Float32
from .cuda_memory import Device, aligned
from .device_cache import ITEM_SIZES

StepShape = tuple[int, int, int]
"""(B, S, K)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """One step shape in the buffers: views for the host by role, GPU addresses by role, and bytes to copy."""

    batch: int
    inputs: dict[str, NDArray[Any]]
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    size: int
    steps: NDArray[np.int64]


class StepBuffers:
    """Buffers for all steps that some limits allow; those of the logits grow when more of them are asked for."""

    def __init__(self, device: Device, roles: Iterable[str], limits: Limits) -> None:
        """Allocate; enter the device first.

        Args:
            device: where the GPU memory is.
            roles: inputs that the graph takes.
            limits: of batch, chunk and vocabulary.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        self._device, self._limits = device, limits
        self._roles = tuple(roles)
        self._packings: dict[StepShape, Packing] = {}
        size = sum(aligned(limits.max_batch * limits.max_chunk * 8) for _ in contract.INPUTS)
        self._inputs = device.allocate(size, "the inputs of one step", "use a larger GPU")
        self._host = device.allocate_host(size)
        self.logits_address = 0
        self._logits: NDArray[np.uint8] | None = None
        self._reserve(limits.max_batch)

    def packing(self, shape: StepShape) -> Packing:
        """Where the inputs of a step of this shape lie."""
        return self._packings.get(shape) or self._pack(shape)

    def logits(self, rows: int) -> Float32:
        """The host's buffer of logits (rows, V); it may move, and so may `logits_address`, when rows grow."""
        if self._logits is None or rows * self._limits.vocab_size * 4 > self._logits.size:
            self._reserve(rows)
        assert self._logits is not None
        return self._logits.view(np.float32).reshape(-1, self._limits.vocab_size)[:rows]

    def upload(self, packing: Packing) -> None:
        """Bring a step's inputs to the GPU, in stream order."""
        self._device.upload(self._inputs, self._host.ctypes.data, packing.size)

    def download(self, logits: Float32) -> None:
        """Bring a step's logits from the GPU into this part of the host's buffer, in stream order."""
        self._device.download(logits.ctypes.data, self.logits_address, logits.nbytes)

    def _reserve(self, rows: int) -> None:
        if self._logits is not None:
            self._device.synchronize()
            self._device.free(self.logits_address)
            self._device.free_host(self._logits)
            self._logits = None
        size = rows * self._limits.vocab_size * 4
        self.logits_address = self._device.allocate(size, f"logits of {rows} tokens", "ask for fewer logits a step")
        self._logits = self._device.allocate_host(size)

    def _pack(self, shape: StepShape) -> Packing:
        sizes = dict(zip((contract.BATCH, contract.SEQUENCE, contract.NUM_LOGITS), shape, strict=True))
        extents = {role: tuple(sizes[d] for d in contract.INPUTS[role][1]) for role in contract.INPUTS}
        types = {role: contract.INPUTS[role][0] for role in contract.INPUTS}
        lengths = [aligned(math.prod(extents[role]) * ITEM_SIZES[types[role]]) for role in contract.INPUTS]
        *places, total = itertools.accumulate(lengths, initial=0)
        by_role = dict(zip(contract.INPUTS, places, strict=True))
        inputs = {
            role: np.frombuffer(self._host, types[role], math.prod(extents[role]), by_role[role]).reshape(extents[role])
            for role in contract.INPUTS
        }
        packing = self._packings[shape] = Packing(
            shape[0],
            inputs,
            {role: extents[role] for role in self._roles},
            {role: self._inputs + by_role[role] for role in self._roles},
            total,
            np.arange(shape[1]),
        )
        return packing
