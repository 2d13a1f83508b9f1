"""One GPU as an engine sees it: a stream, memory that is counted, copies, and captured graphs.

Everything goes to one stream in order. Knows bytes and addresses; nothing of tensors, TensorRT or models.
"""

import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import DeviceMemoryError, EngineError
from ...plugins_trt.cuda import CudaDriver

ALIGNMENT = 256
"""Of every address that is bound; what `cuMemAlloc` gives, and what TensorRT asks of a tensor."""

_log = logging.getLogger(__name__)


def aligned(size: int) -> int:
    """`size` rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Device(CudaDriver):
    """A GPU's primary context and one stream of it.

    Thread safety: work inside `with device.entered()`; it makes the context current and keeps other threads out, so
    that nothing slips into a capture.
    """

    def __init__(self, bindings: Any = None, ordinal: int = 0) -> None:
        """Open the GPU.

        Args:
            bindings: `cuda.bindings.driver`, or what stands in for it.
            ordinal: which of the visible GPUs.

        Raises:
            EngineError: cuda-python, the NVIDIA driver or the GPU is missing.
        """
        super().__init__(bindings)
        self._lock = threading.RLock()
        self._closed = False
        self._sizes: dict[int, int] = {}
        self._host: set[int] = set()
        self._discarded: deque[int] = deque()
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)
        self._stream = self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)

    @property
    def allocated(self) -> int:
        """Bytes of GPU memory that are held."""
        return sum(self._sizes.values())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread has the GPU for itself.

        Raises:
            EngineError: the device is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            self._call("cuCtxSetCurrent", self._context)
            while self._discarded:
                self.free(self._discarded.popleft())
            yield

    def memory(self) -> tuple[int, int]:
        """Bytes of GPU memory that are free, and that there are."""
        free, total = self._results("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, purpose: str, remedy: str) -> int:
        """GPU memory, aligned to ALIGNMENT.

        Args:
            size: bytes.
            purpose: what it is for, as the subject of a sentence.
            remedy: what to do if it is not there.

        Raises:
            DeviceMemoryError: with purpose, numbers and remedy.
        """
        status, pointer = self._cuda.cuMemAlloc(max(size, ALIGNMENT))
        if status == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise self.out_of_memory(purpose, size, remedy)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise EngineError(f"cuMemAlloc failed: {status.name}")
        self._sizes[int(pointer)] = size
        return int(pointer)

    def out_of_memory(self, purpose: str, needed: int | None, remedy: str) -> DeviceMemoryError:
        """The error that says so in numbers; needed: None if it is not known."""
        free, total = self.memory()
        amount = "more" if needed is None else f"{needed / 1e6:,.1f} MB of"
        message = f"{purpose} needs {amount} GPU memory: {free / 1e6:,.1f} of {total / 1e6:,.1f} MB are free; {remedy}"
        return DeviceMemoryError(message, needed=needed, free=free, total=total)

    def free(self, pointer: int) -> None:
        """Give memory back; an address that is not held is ignored."""
        if self._sizes.pop(pointer, None) is not None:
            self._call("cuMemFree", pointer)

    def discard(self, pointer: int) -> None:
        """Give memory back the next time anyone enters: safe in a finaliser, from any thread."""
        self._discarded.append(pointer)

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Host memory that the GPU copies from and to without the host's help: (size,), zeroed."""
        address = int(self._call("cuMemHostAlloc", size, 0))
        self._host.add(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give it back; no view of it may be used afterwards."""
        address = array.ctypes.data
        if address in self._host:
            self._host.remove(address)
            self._call("cuMemFreeHost", address)

    def zero(self, pointer: int, size: int) -> None:
        """Fill with zeros, in stream order."""
        self._call("cuMemsetD8Async", pointer, 0, size, self._stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """From host memory, in stream order."""
        self._call("cuMemcpyHtoDAsync", target, source, size, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """To host memory, in stream order."""
        self._call("cuMemcpyDtoHAsync", target, source, size, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, *, to_host: bool = False
    ) -> None:
        """`height` pieces of `width` bytes, `pitch` bytes apart, between GPU addresses or to the host."""
        kinds = self._cuda.CUmemorytype
        copy = self._cuda.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = kinds.CU_MEMORYTYPE_DEVICE, source, pitch
        copy.dstPitch, copy.WidthInBytes, copy.Height = target_pitch, width, height
        if to_host:
            copy.dstMemoryType, copy.dstHost = kinds.CU_MEMORYTYPE_HOST, target
        else:
            copy.dstMemoryType, copy.dstDevice = kinds.CU_MEMORYTYPE_DEVICE, target
        self._call("cuMemcpy2DAsync", copy, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` asks of the stream, without doing it; the result is for `launch_graph`.

        Raises:
            EngineError: the work cannot be captured, or `work` raised it. The stream is as it was.
        """
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            status, graph = self._cuda.cuStreamEndCapture(self._stream)
            if status == self._cuda.CUresult.CUDA_SUCCESS:
                self._call("cuGraphDestroy", graph)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any) -> None:
        """Do, in stream order, what was captured."""
        self._call("cuGraphLaunch", graph, self._stream)

    def destroy_graph(self, graph: Any) -> None:
        """Forget a captured graph that is not running."""
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Give everything back, whatever state the GPU is in: a failure here is logged, not raised."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._attempt("cuCtxSetCurrent", self._context)
            self._attempt("cuStreamSynchronize", self._stream)
            for pointer in self._sizes:
                self._attempt("cuMemFree", pointer)
            for address in self._host:
                self._attempt("cuMemFreeHost", address)
            self._sizes.clear()
            self._host.clear()
            self._attempt("cuStreamDestroy", self._stream)
            self._attempt("cuDevicePrimaryCtxRelease", self._device)

    def _attempt(self, name: str, *arguments: Any) -> None:
        try:
            self._call(name, *arguments)
        except EngineError as error:
            _log.warning("while closing: %s", error)

    def _results(self, name: str) -> tuple[Any, ...]:
        status, *results = getattr(self._cuda, name)()
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed: {status.name}")
        return tuple(results)
