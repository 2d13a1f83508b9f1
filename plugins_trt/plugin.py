"""TensorRT's classes for a marker: IPluginV3 with its three capabilities, and the creator, for either TensorRT.

TensorRT calls these from C++. An exception there is at best printed (`get_fields_to_serialize`) and at worst ends
the process (`clone`), so each callback notes its failure with the node's name before it lets TensorRT fail, and
`Failures.check` turns the notes into one BuildError after the build.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from .. import BuildError
from .cubins import CubinLibrary
from .launcher import Launch, Launcher
from .marker import Marker, Tensor

NAMESPACE, VERSION = "zonda", "1"


@dataclass(slots=True)
class Failures:
    """What went wrong inside callbacks, in order: (node, callback, error)."""

    entries: list[tuple[str, str, Exception]] = field(default_factory=list)

    def check(self) -> None:
        """Raise BuildError if anything was noted: the first failure in the message, the rest counted."""
        if self.entries:
            node, callback, error = self.entries[0]
            others = f" (and {len(self.entries) - 1} more)" if len(self.entries) > 1 else ""
            self.entries.clear()
            raise BuildError(f"plugin node {node}: {error}{others} [{callback}]") from error


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all plugins of one registration share.

    trt: the module, `tensorrt` or `tensorrt_rtx`.
    launcher: called when a kernel is first needed: on a host with a GPU.
    """

    trt: ModuleType
    library: CubinLibrary
    launcher: Callable[[], Launcher]
    failures: Failures

    @property
    def dtypes(self) -> Mapping[Any, str]:
        """TensorRT's data types -> our names."""
        types = self.trt.DataType
        return {types.HALF: "fp16", types.BF16: "bf16", types.FLOAT: "fp32", types.INT8: "int8", types.INT64: "int64"}

    def tensor(self, description: Any) -> Tensor:
        """From a PluginTensorDesc."""
        dtype = self.dtypes.get(description.type, str(description.type))
        return Tensor(tuple(description.dims), dtype)


def noted(method: Callable[..., Any]) -> Callable[..., Any]:
    """A callback that notes its exception with the node's name before TensorRT sees it."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:
            self.around.failures.entries.append((self.node, method.__name__, error))
            raise

    return call


class PluginMethods:
    """The callbacks of a plugin. `registry.py` adds the base classes of the TensorRT at hand, named in `bases`."""

    bases: ClassVar[tuple[type[Any], ...]] = ()

    def __init__(self, node: str, marker: Marker, around: Surroundings) -> None:
        """The attributes that TensorRT reads, and the serialised fields, so that no later callback can fail on them."""
        for base in self.bases:
            base.__init__(self)
        self.node, self.marker, self.around = node, marker, around
        self.launcher: Launcher | None = None
        self.launch: Launch | None = None
        self.plugin_name, self.plugin_namespace, self.plugin_version = marker.name, NAMESPACE, VERSION
        self.num_outputs = len(marker.outputs)
        self.timing_cache_id = ""
        # The collection refers to these arrays and does not own them.
        self.storage = {
            f.name: np.array([marker.values()[f.name]], np.float32 if f.kind is float else np.int32)
            for f in marker.fields
        }
        kinds = around.trt.PluginFieldType
        self.serialised = around.trt.PluginFieldCollection(
            [
                around.trt.PluginField(f.name, self.storage[f.name], kinds.FLOAT32 if f.kind is float else kinds.INT32)
                for f in marker.fields
            ]
        )

    def get_capability_interface(self, kind: Any) -> Any:  # noqa: ARG002
        """One object has all capabilities."""
        return self

    def get_fields_to_serialize(self) -> Any:
        """Built in `set_up`."""
        return self.serialised

    @noted
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Each output has the type of an input."""
        return [input_types[port.like or 0] for port in self.marker.outputs]

    @noted
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:  # noqa: ARG002
        """Each output has the shape of an input."""
        return [self.around.trt.DimsExprs(list(inputs[port.like or 0])) for port in self.marker.outputs]

    @noted
    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Row-major tensors of the marker's types."""
        if num_inputs != len(self.marker.inputs):
            names = ", ".join(port.name for port in self.marker.inputs)
            raise BuildError(f"{self.marker.name} takes {names}; the node has {num_inputs} inputs")
        dtypes = [self.around.dtypes.get(d.desc.type) for d in in_out[: position + 1]]
        linear = in_out[position].desc.format == self.around.trt.TensorFormat.LINEAR
        return bool(linear and self.marker.accepts(position, dtypes))

    @noted
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Refuse at build time what has no kernel."""
        variant = self.marker.variant([self.around.tensor(d.desc) for d in inputs])
        self.around.library.require(self.around.library.capabilities, [variant])

    def get_valid_tactics(self) -> list[int]:
        """No choice of algorithm."""
        return []

    def get_workspace_size(self, *descriptions: Any) -> int:  # noqa: ARG002
        """None: everything stays in registers."""
        return 0

    def set_tactic(self, tactic: int) -> None:
        """No choice of algorithm."""

    @noted
    def attach_to_context(self, resources: Any) -> Any:  # noqa: ARG002
        """A copy of its own for an execution context, its kernels loaded on this device."""
        attached = self.clone()
        attached.launcher = self.around.launcher()
        attached.launcher.prepare(self.marker.kernel)
        return attached

    @noted
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Bind the launch: all that depends on shapes."""
        tensors = [self.around.tensor(d) for d in inputs]
        self.launch = self.bind(tensors)

    @noted
    def enqueue(
        self,
        input_descriptions: Sequence[Any],
        output_descriptions: Sequence[Any],  # noqa: ARG002
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,  # noqa: ARG002
        stream: int,
    ) -> None:
        """Launch on TensorRT's stream."""
        if self.launch is None:
            self.launch = self.bind([self.around.tensor(d) for d in input_descriptions])
        self.launch([*inputs, *outputs], stream)

    def bind(self, tensors: Sequence[Tensor]) -> Launch:
        """The launch for inputs of known shape."""
        launcher = self.launcher or self.around.launcher()
        variant = self.marker.variant(tensors)
        programs = self.marker.programs(tensors, dict(launcher.cubin(variant).constants))
        return launcher.bind(variant, programs, self.marker.scalars(tensors))

    def clone(self) -> Any:
        """An equal plugin. TensorRT does not survive an exception here; there is nothing in it that can fail."""
        return type(self)(self.node, self.marker, self.around)


class CreatorMethods:
    """The callbacks of a creator, likewise."""

    bases: ClassVar[tuple[type[Any], ...]] = ()

    def __init__(self, marker_class: type[Marker], plugin: Callable[..., Any], around: Surroundings) -> None:
        """The attributes that TensorRT reads. plugin: the class, as `PluginMethods`."""
        for base in self.bases:
            base.__init__(self)
        self.marker_class, self.plugin, self.around = marker_class, plugin, around
        self.name, self.plugin_namespace, self.plugin_version = marker_class.name, NAMESPACE, VERSION
        trt = around.trt
        kinds = {float: trt.PluginFieldType.FLOAT32, int: trt.PluginFieldType.INT32}
        self.field_names = trt.PluginFieldCollection(
            [trt.PluginField(f.name, np.array([]), kinds[f.kind]) for f in marker_class.fields]
        )

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:  # noqa: ARG002
        """From the node's attributes (build) or the plan's (run time). None tells TensorRT that it failed."""
        try:
            values = read_fields(self.around.trt, self.marker_class, fields)
            return self.plugin(name, self.marker_class.create(values), self.around)
        except Exception as error:
            self.around.failures.entries.append((name, "create_plugin", error))
            return None


def read_fields(trt: ModuleType, marker: type[Marker], fields: Any) -> dict[str, float]:
    """Values of the marker's fields from a PluginFieldCollection.

    Raises:
        BuildError: a field is missing, unknown, of another type, or not one number.
    """
    kinds = {float: (trt.PluginFieldType.FLOAT32, np.float32), int: (trt.PluginFieldType.INT32, np.int32)}
    expected = {f.name: kinds[f.kind] for f in marker.fields}
    values: dict[str, float] = {}
    for given in fields:
        if given.name not in expected:
            raise BuildError(f"{marker.name} has no attribute {given.name!r}; it has {sorted(expected)}")
        kind, dtype = expected[given.name]
        if given.type != kind:
            raise BuildError(f"{marker.name}: attribute {given.name} is {given.type.name}, not {kind.name}")
        data = np.asarray(given.data)
        if data.size != 1:
            raise BuildError(f"{marker.name}: attribute {given.name} holds {data.size} values, not one")
        values[given.name] = data.reshape(-1).view(dtype)[0].item()
    missing = sorted(expected.keys() - values.keys())
    if missing:
        raise BuildError(f"{marker.name} lacks the attribute {', '.join(missing)}")
    return values
