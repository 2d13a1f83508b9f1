"""The CUDA driver through cuda-python, as `launcher.Driver`. Imported on first use: a build host has no CUDA."""

import importlib
from typing import Any

from .. import EngineError

_STATIC_LIMIT = 48 * 1024  # beyond it a kernel must be allowed its shared memory


class CudaDriver:
    """Raises EngineError from every method, with CUDA's own name for what went wrong."""

    def __init__(self, bindings: Any = None) -> None:
        """Take `cuda.bindings.driver`, or what stands in for it. Raises EngineError if cuda-python is not installed."""
        try:
            self._cuda: Any = bindings or importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise EngineError(f"TensorRT plugins need cuda-python: {error}; pip install cuda-python") from error

    def context(self) -> int:
        """See `Driver`."""
        return int(self._call("cuCtxGetCurrent"))

    def capability(self) -> int:
        """See `Driver`."""
        device = self._call("cuCtxGetDevice")
        attributes = self._cuda.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        return int(major) * 10 + int(minor)

    def load(self, image: bytes) -> Any:
        """See `Driver`."""
        return self._call("cuModuleLoadData", image)

    def unload(self, module: Any) -> None:
        """See `Driver`."""
        self._call("cuModuleUnload", module)

    def function(self, module: Any, name: str, shared: int) -> Any:
        """See `Driver`."""
        function = self._call("cuModuleGetFunction", module, name.encode())
        if shared > _STATIC_LIMIT:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(self, function: Any, grid: int, block: int, shared: int, stream: int, parameters: int) -> None:
        """See `Driver`."""
        self._call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared, stream, parameters, 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *results = getattr(self._cuda, name)(*arguments)
        except RuntimeError as error:  # the driver library itself is missing or too old
            raise EngineError(f"{name} failed: {error}") from error
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed: {status.name}")
        return results[0] if results else None
