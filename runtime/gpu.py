"""What this host has of NVIDIA, and whether a TensorRT plan can run on it: one sentence, with the nearest fix.

Asks the driver only; no TensorRT is loaded and no memory taken.
"""

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .. import EngineError
from .manifest import Target

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Kind of a target -> module that runs it."""

_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
_RTX = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX builds for


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. capability: major * 10 + minor. memory: bytes."""

    name: str
    capability: int
    memory: int


@functools.cache
def find_gpu() -> Gpu | str:
    """The first visible GPU, or why there is none; asked once a process."""
    from ..plugins_trt.cuda import CudaDriver

    if not is_installed("cuda"):
        return "cuda-python is not installed; pip install 'zonda[rtx]' or 'zonda[tensorrt]'"
    try:
        return probe(CudaDriver())
    except EngineError as error:
        return f"this host has no usable NVIDIA GPU ({error}); run it on a host with one and its driver"


def probe(driver: Any) -> Gpu:
    """The first visible GPU of a `CudaDriver`. Raises EngineError."""
    cuda, call = driver._cuda, driver._call
    call("cuInit", 0)
    device = call("cuDeviceGet", 0)
    name = call("cuDeviceGetName", 64, device)
    attributes = cuda.CUdevice_attribute
    major = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    text = name.split(b"\0")[0].decode(errors="replace") if isinstance(name, bytes) else str(name)
    return Gpu(text, int(major) * 10 + int(minor), int(call("cuDeviceTotalMem", device)))


def plan_obstacle(target: Target) -> str | None:
    """Why a TensorRT target's plan cannot run on this host, with the nearest fix; None if nothing speaks against it."""
    module = MODULES[target.kind]
    if not is_installed(module):
        extra = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}[target.kind]
        return f"{module} is not installed; pip install 'zonda[{extra}]'"
    gpu = find_gpu()
    if isinstance(gpu, str):
        return gpu
    return _wrong_gpu(target, gpu) or _wrong_version(target, installed_version(target.kind))


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def installed_version(kind: str) -> str | None:
    """Version of the installed TensorRT that runs targets of a kind, None if it is not known."""
    for distribution in _DISTRIBUTIONS[kind]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _wrong_gpu(target: Target, gpu: Gpu) -> str | None:
    built = target.compute_capabilities
    if not built or gpu.capability in built:
        return None
    fix = f"build again with --target {target.kind} --compute-capability {gpu.capability}"
    if target.kind == "tensorrt":
        fix = "build again with --target tensorrt on this host"
    elif gpu.capability not in _RTX:
        fix = "TensorRT-RTX does not know this GPU: build with --target tensorrt on this host"
    numbers = ", ".join(map(str, built))
    return f"the plan was built for compute capability {numbers}; {gpu.name} here has {gpu.capability}: {fix}"


def _wrong_version(target: Target, installed: str | None) -> str | None:
    built = _built_with(target.kind, target.tool_versions)
    if built is None or installed is None or built.split(".")[:3] == installed.split(".")[:3]:
        return None
    package = _DISTRIBUTIONS[target.kind][0]
    return (
        f"the plan was built with {package} {built}, {installed} is installed here, and plans are not portable between "
        f"versions; pip install {package}=={built}, or build again"
    )


def _built_with(kind: str, versions: Mapping[str, str]) -> str | None:
    distributions = _DISTRIBUTIONS[kind]
    for key in (kind, MODULES[kind], *distributions, *(name.replace("-", "_") for name in distributions)):
        if key in versions:
            return versions[key]
    return None
