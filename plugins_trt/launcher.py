"""Launch cubins over the CUDA driver API: on the caller's stream, without an allocation, capturable in a graph.

A launch is bound once (kernel, grid, scalars) and then only given pointers. The driver is a parameter, so a
recording one shows every launch without a GPU.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from .. import EngineError
from .cubins import Cubin, CubinLibrary, Variant

_ALIGNMENT = 16  # of every pointer: the kernels read 16 bytes at a time, and were compiled to know they may
_SCALARS: dict[str, Any] = {"fp32": ctypes.c_float, "i32": ctypes.c_int32}
_SCRATCH = 2  # pointers that Triton's calling convention adds; null, since these kernels use no scratch


class Driver(Protocol):
    """What is needed of CUDA. Handles are whatever the driver gives; every method raises EngineError."""

    def context(self) -> int:
        """The current CUDA context, as a number."""

    def capability(self) -> int:
        """Compute capability of the current device: major * 10 + minor."""

    def load(self, image: bytes) -> Any:
        """Load a cubin into the current context: a module."""

    def unload(self, module: Any) -> None:
        """Forget a module."""

    def function(self, module: Any, name: str, shared: int) -> Any:
        """A kernel of the module, allowed to use `shared` bytes of dynamic shared memory."""

    def launch(self, function: Any, grid: int, block: int, shared: int, stream: int, parameters: int) -> None:
        """Launch grid x block threads on the stream. parameters: address of an array of addresses, one a parameter."""


class Launch:
    """One kernel with its grid and scalars; only the pointers change from call to call.

    Not for two threads at once, as a TensorRT execution context is not.
    """

    def __init__(self, driver: Driver, function: Any, cubin: Cubin, programs: int, scalars: Sequence[float]) -> None:
        """See `Launcher.bind`."""
        kinds = [kind for _, kind in cubin.parameters]
        self._pointers = [ctypes.c_uint64() for kind in kinds if kind.startswith("*")]
        types = [_SCALARS[kind] for kind in kinds if not kind.startswith("*")]
        if kinds != sorted(kinds, key=lambda kind: not kind.startswith("*")) or len(types) != len(scalars):
            raise EngineError(f"{cubin.variant}: parameters {kinds} do not take {len(scalars)} scalars at their end")
        cells = [*self._pointers, *map(_cell, types, scalars), *(ctypes.c_uint64(0) for _ in range(_SCRATCH))]
        self._cells = cells  # the addresses below point into them
        self._table = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        self._address = ctypes.addressof(self._table)
        self._driver, self._function, self._name = driver, function, str(cubin.variant)
        self._programs, self._threads, self._shared = programs, 32 * cubin.num_warps, cubin.shared

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        """Launch, unless there is nothing to do (an empty batch).

        Args:
            pointers: device addresses of the inputs, then the outputs.
            stream: CUDA stream handle.

        Raises:
            EngineError: a pointer is missing or not aligned to 16 bytes, or CUDA refuses.
        """
        if not self._programs:
            return
        if len(pointers) != len(self._pointers):
            raise EngineError(f"{self._name} takes {len(self._pointers)} pointers, not {len(pointers)}")
        for cell, pointer in zip(self._pointers, pointers, strict=True):
            if not pointer or pointer % _ALIGNMENT:
                raise EngineError(f"{self._name}: pointer {pointer:#x} is null or not aligned to {_ALIGNMENT} bytes")
            cell.value = pointer
        self._driver.launch(self._function, self._programs, self._threads, self._shared, stream, self._address)


class Launcher:
    """The kernels of one library on the devices of this process; each is loaded once a CUDA context.

    Safe to share between threads.
    """

    def __init__(self, library: CubinLibrary, driver: Driver) -> None:
        """Load nothing yet."""
        self._library, self._driver = library, driver
        self._loaded: dict[tuple[int, Variant], tuple[Any, Any, Cubin]] = {}
        self._lock = threading.Lock()

    def prepare(self, kernel: str) -> None:
        """Load every variant of a kernel for the current device, so that no load happens during a graph capture.

        Raises:
            EngineError: this device's compute capability has no cubins; the message says which have.
        """
        for variant in self._library.variants:
            if variant.kernel == kernel:
                self._load(variant)

    def bind(self, variant: Variant, programs: int, scalars: Sequence[float]) -> Launch:
        """A launch of `variant` in the current context.

        Args:
            variant: a member of the library.
            programs: blocks of the grid.
            scalars: the kernel's scalars, in order.

        Raises:
            EngineError: the library lacks the variant or this device, or CUDA refuses the module.
        """
        _, function, cubin = self._load(variant)
        return Launch(self._driver, function, cubin, programs, scalars)

    def cubin(self, variant: Variant) -> Cubin:
        """The cubin that this device takes for `variant`. Raises EngineError as `bind`."""
        capability = self._driver.capability()
        if capability not in self._library.capabilities:
            have = list(self._library.capabilities)
            raise EngineError(f"this GPU has compute capability {capability}; the kernels were compiled for {have}")
        if variant not in self._library.variants:
            raise EngineError(
                f"{variant} is not among the engine's kernels: engine and kernels are of different builds"
            )
        return self._library.find(variant, capability)

    def close(self) -> None:
        """Unload all modules; no launch of this launcher may be used or replayed afterwards."""
        with self._lock:
            for module, _, _ in self._loaded.values():
                self._driver.unload(module)
            self._loaded.clear()

    def _load(self, variant: Variant) -> tuple[Any, Any, Cubin]:
        with self._lock:
            key = (self._driver.context(), variant)
            if key not in self._loaded:
                cubin = self.cubin(variant)
                module = self._driver.load(cubin.image)
                self._loaded[key] = module, self._driver.function(module, cubin.function, cubin.shared), cubin
            return self._loaded[key]


def _cell(kind: Any, value: float) -> Any:
    return kind(int(value) if kind is ctypes.c_int32 else value)
