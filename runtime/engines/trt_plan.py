"""A TensorRT plan, opened: its tensors, its profiles, and execution contexts over one shared activation memory.

Serves `tensorrt` and `tensorrt_rtx`; what only one of them has is asked for by name. Knows names, shapes and
addresses; nothing of tokens.
"""

import mmap
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ... import EngineError
from ...plugins_trt.cubins import CubinLibrary
from ...plugins_trt.registry import register
from .cuda_memory import Device
from .trt_log import logger_of

Shape = tuple[int, ...]

_DTYPES = {
    "HALF": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
_opening = threading.Lock()  # plugins are registered for the whole process


@dataclass(frozen=True, slots=True)
class Profile:
    """What shapes of the inputs one optimisation profile takes: name -> (minimum, maximum), inclusive."""

    index: int
    ranges: Mapping[str, tuple[Shape, Shape]]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether all shapes lie in the profile's ranges."""
        return all(
            all(low <= size <= high for low, size, high in zip(*_columns(self.ranges[name], shape), strict=True))
            for name, shape in shapes.items()
            if name in self.ranges
        )


class Context:
    """An execution context and what it is bound to; sets only what differs from the last time."""

    def __init__(self, plan: "Plan", context: Any) -> None:
        """See `Plan.context`."""
        self._plan, self._context = plan, context
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Bind input shapes, and the address of every input and output.

        Raises:
            EngineError: TensorRT refuses one; the message names the tensor.
        """
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._require(self._context.set_input_shape(name, shape), f"input {name} of shape {shape}")
                self._shapes[name] = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._require(self._context.set_tensor_address(name, address), f"address {address:#x} for {name}")
                self._addresses[name] = address

    def enqueue(self) -> None:
        """Ask for one execution on the device's stream.

        Raises:
            EngineError: TensorRT or a plugin refuses; the message has its words, and the plugin's node.
        """
        with self._plan.reporting():
            accepted = self._context.execute_async_v3(self._plan.device.stream)
        if not accepted:
            shapes = ", ".join(f"{name} {shape}" for name, shape in self._shapes.items() if len(shape) < 4)
            raise EngineError(f"TensorRT refused a step of {shapes}: {self._plan.said()}")

    def uncapturable(self) -> str | None:
        """Why TensorRT will not be captured in a CUDA graph, None if it may be."""
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is None or ask(self._plan.device.stream):
            return None
        return "TensorRT says that this plan cannot be captured"

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(f"TensorRT does not take {what}: {self._plan.said()}")


class Plan:
    """A deserialised plan on a device. Not for two threads at once; enter the device first."""

    def __init__(
        self, trt: ModuleType, file: Path, device: Device, cubins: bytes | None = None, plugins: Sequence[str] = ()
    ) -> None:
        """Register the plugins, deserialise, and allocate what executions need.

        Args:
            trt: `plugins_trt.trt.load(…)`.
            file: the plan.
            device: where to run; closed by whoever opened it.
            cubins: the plugins' kernels; None if the plan has no plugins.
            plugins: the operators that are plugins in this plan.

        Raises:
            EngineError: TensorRT cannot read the plan here; the message has its words.
            DeviceMemoryError: weights or activations do not fit.
            BundleError: the kernel library is damaged.
        """
        self.device = device
        self._trt, self._file, self._words = trt, file, logger_of(trt)
        self._registration: Any = None
        self._memory: int | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._cache: Any = None
        try:
            self._open(CubinLibrary.from_bytes(cubins) if cubins is not None else None, plugins)
        except BaseException:
            self.close()
            raise

    def _open(self, library: CubinLibrary | None, plugins: Sequence[str]) -> None:
        with _opening:
            if library is not None:
                self._registration = register(self._trt, library, tuple(plugins), driver=lambda: self.device)
            self._words.entries.clear()
            self._runtime = self._trt.Runtime(self._words)
            with (
                self.reporting(),
                self._file.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            words = self.said()
            if "out of memory" in words.lower() or "outofmemory" in words.lower():
                raise self.device.out_of_memory(f"{self._file.name}", self._file.stat().st_size, "use a larger GPU")
            raise EngineError(f"{self._file}: TensorRT cannot read the plan on this host: {words}")
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        mode = self._trt.TensorIOMode.INPUT
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == mode)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        self.dtypes = {name: _dtype(engine.get_tensor_dtype(name)) for name in names}
        self.shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self.profiles = tuple(self._profile(index) for index in range(engine.num_optimization_profiles))
        self.activation_bytes = max(
            int(engine.get_device_memory_size_for_profile_v2(profile.index)) for profile in self.profiles
        )
        self._memory = self.device.allocate(
            self.activation_bytes, "the activations of one step", "build with a smaller --max-chunk or --max-batch"
        )

    def context(self, profile: Profile, *, repeated: bool) -> Context:
        """A new execution context of a profile; all contexts share the activation memory.

        Args:
            profile: one of `profiles`.
            repeated: it will run the same shapes again and again, so kernels made for them pay (TensorRT-RTX).

        Raises:
            EngineError: TensorRT refuses.
            DeviceMemoryError: its own memory does not fit.
        """
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self.reporting():
            context = self._engine.create_execution_context(self._configuration(managed, repeated) or managed)
        if context is None:
            words = self.said()
            if "memory" in words.lower():
                raise self.device.out_of_memory("an execution context", None, "load with a smaller max_batch")
            raise EngineError(f"TensorRT makes no execution context: {words}")
        if not context.set_optimization_profile_async(profile.index, self.device.stream):
            raise EngineError(f"TensorRT does not take profile {profile.index}: {self.said()}")
        context.set_device_memory(self._memory, self.activation_bytes)
        return Context(self, context)

    def reporting(self) -> AbstractContextManager[None]:
        """Around what calls plugins: if one failed in it, EngineError with the node's name."""
        return nullcontext() if self._registration is None else self._registration.reporting(EngineError)

    def said(self) -> str:
        """TensorRT's last errors, in its words."""
        words = "; ".join(self._words.entries) or "it gave no reason"
        self._words.entries.clear()
        return words

    def close(self) -> None:
        """Let go of engine, plugins and memory; contexts must be gone already."""
        self._engine = self._cache = self._runtime = None
        if self._registration is not None:
            self._registration.close()
            self._registration = None
        if self._memory is not None:
            self.device.free(self._memory)
            self._memory = None

    def _profile(self, index: int) -> Profile:
        ranges = {}
        for name in self.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, index)
            ranges[name] = tuple(low), tuple(high)
        return Profile(index, ranges)

    def _configuration(self, managed: Any, repeated: bool) -> Any:
        """A run-time configuration where this TensorRT has them (RTX compiles kernels when it first runs)."""
        make = getattr(self._engine, "create_runtime_config", None)
        if make is None:
            return None
        configuration = make()
        configuration.set_execution_context_allocation_strategy(managed)
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None and repeated:
            configuration.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if hasattr(configuration, "create_runtime_cache"):
            self._cache = self._cache or configuration.create_runtime_cache()
            configuration.set_runtime_cache(self._cache)
        return configuration


def _columns(limits: tuple[Shape, Shape], shape: Shape) -> tuple[Shape, Shape, Shape]:
    return limits[0], shape, limits[1]


def _dtype(kind: Any) -> str:
    return _DTYPES.get(kind.name, str(kind.name).lower())
