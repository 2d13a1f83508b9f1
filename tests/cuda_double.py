"""A double of `cuda.bindings.driver`, with the same method names, that records and computes.

GPU memory is host memory at real addresses, filled with garbage when it is allocated; every access is checked against
what is allocated.
"""

# ruff: noqa: N802

import ctypes
import enum
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np

Result = enum.Enum(
    "CUresult",
    [
        "CUDA_SUCCESS",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_NO_DEVICE",
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    ],
)
ATTRIBUTES = [f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")]
OK = Result.CUDA_SUCCESS


class Pointer(int):
    """As CUdeviceptr: not an int to compare with, but convertible."""


class FakeCuda:
    """`fail[name]` makes the calls of that name answer with another result; `calls` has (name, arguments)."""

    CUresult = Result
    CUdevice_attribute = enum.Enum("CUdevice_attribute", ATTRIBUTES)
    CUstream_flags = enum.Enum("CUstream_flags", ["CU_STREAM_NON_BLOCKING"])
    CUstreamCaptureMode = enum.Enum("CUstreamCaptureMode", ["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"])
    CUmemorytype = enum.Enum("CUmemorytype", ["CU_MEMORYTYPE_HOST", "CU_MEMORYTYPE_DEVICE"])
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, total=1 << 30, capability=(8, 9)):
        self.total, self.capability = total, capability
        self.device_memory, self.host_memory = {}, {}
        self.graphs, self.executables, self.streams, self.modules = {}, {}, set(), {}
        self.contexts = 0
        self.capturing = None
        self.calls, self.fail, self.allocations = [], {}, 0
        self._handle = 0x1000

    def live(self):
        """Everything that is held: 0 after a clean shutdown."""
        held = (self.device_memory, self.host_memory, self.graphs, self.executables, self.streams, self.modules)
        return sum(map(len, held)) + self.contexts

    def count(self, name):
        return Counter(call[0] for call in self.calls)[name]

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(value):
            return value

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fail:
                if name == "cuStreamEndCapture":
                    self.capturing = None
                return self.fail[name], None
            result = value(*arguments)
            return (OK,) if result is None else result if isinstance(result, tuple) else (OK, result)

        return call

    def handle(self):
        self._handle += 0x100
        return self._handle

    def enqueue(self, work):
        """Do it now, or note it if the stream is being captured."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def check(self, address, size, memory):
        for base, buffer in memory.items():
            if base <= address and address + size <= base + len(buffer):
                return
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    # initialisation
    def cuInit(self, flags): ...
    def cuDeviceGet(self, ordinal):
        return f"device {ordinal}"

    def cuDeviceGetName(self, length, device):
        return b"NVIDIA Double\0".ljust(length, b"\0")

    def cuDeviceTotalMem(self, device):
        return self.total

    def cuDeviceGetAttribute(self, attribute, device):
        return self.capability[0] if attribute.name.endswith("MAJOR") else self.capability[1]

    def cuDevicePrimaryCtxRetain(self, device):
        self.contexts += 1
        return 0x77

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts -= 1

    def cuCtxSetCurrent(self, context):
        assert context == 0x77

    def cuCtxGetCurrent(self):
        return 0x77

    def cuCtxGetDevice(self):
        return "device 0"

    def cuStreamCreate(self, flags):
        stream = self.handle()
        self.streams.add(stream)
        return stream

    def cuStreamDestroy(self, stream):
        self.streams.remove(stream)

    def cuStreamSynchronize(self, stream):
        assert self.capturing is None, "synchronised in a capture"
        assert stream in self.streams

    # memory
    def cuMemGetInfo(self):
        return OK, self.total - sum(map(len, self.device_memory.values())), self.total

    def cuMemAlloc(self, size):
        assert self.capturing is None, "allocated in a capture"
        if size > self.cuMemGetInfo()[1]:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        self.allocations += 1
        buffer = Buffer(size)
        self.device_memory[buffer.address] = buffer
        return Pointer(buffer.address)

    def cuMemFree(self, pointer):
        del self.device_memory[pointer]

    def cuMemHostAlloc(self, size, flags):
        buffer = Buffer(size)
        self.host_memory[buffer.address] = buffer
        return buffer.address

    def cuMemFreeHost(self, address):
        del self.host_memory[address]

    def cuMemsetD8Async(self, pointer, value, size, stream):
        self.check(pointer, size, self.device_memory)
        self.enqueue(lambda: ctypes.memset(pointer, value, size))

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        self.check(target, size, self.device_memory)
        self.check(source, size, self.host_memory)
        self.enqueue(lambda: ctypes.memmove(target, source, size))

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        self.check(target, size, self.host_memory)
        self.check(source, size, self.device_memory)
        self.enqueue(lambda: ctypes.memmove(target, source, size))

    def cuMemcpy2DAsync(self, copy, stream):
        to_host = copy.dstMemoryType.name.endswith("HOST")
        target = copy.dstHost if to_host else copy.dstDevice
        for row in range(copy.Height):
            since, to = copy.srcDevice + row * copy.srcPitch, target + row * copy.dstPitch
            self.check(since, copy.WidthInBytes, self.device_memory)
            if not to_host:
                self.check(to, copy.WidthInBytes, self.device_memory)
            self.enqueue(lambda to=to, since=since: ctypes.memmove(to, since, copy.WidthInBytes))

    # graphs
    def cuStreamBeginCapture(self, stream, mode):
        assert self.capturing is None
        self.capturing = []

    def cuStreamEndCapture(self, stream):
        graph, work = self.handle(), self.capturing
        self.capturing = None
        self.graphs[graph] = work
        return graph

    def cuGraphInstantiate(self, graph, flags):
        executable = self.handle()
        self.executables[executable] = self.graphs[graph]
        return executable

    def cuGraphDestroy(self, graph):
        del self.graphs[graph]

    def cuGraphExecDestroy(self, executable):
        del self.executables[executable]

    def cuGraphLaunch(self, executable, stream):
        for work in self.executables[executable]:
            work()

    # modules
    def cuModuleLoadData(self, image):
        module = self.handle()
        self.modules[module] = image
        return module

    def cuModuleUnload(self, module):
        del self.modules[module]

    def cuModuleGetFunction(self, module, name):
        return f"function {name.decode()}"


class Buffer:
    def __init__(self, size):
        self.memory = (ctypes.c_uint8 * (size + 256))()
        self.address = -(-ctypes.addressof(self.memory) // 256) * 256
        self.size = size
        ctypes.memset(self.address, 0xCD, size)

    def __len__(self):
        return self.size


def array_at(address, shape, dtype):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
