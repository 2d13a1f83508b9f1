"""TensorRT's classes for a marker: IPluginV3 with its three capabilities, and the creator, for either TensorRT.

TensorRT calls these from C++. While it parses, an exception is a clean failure, so that is when everything is
checked. While it builds, a plugin that fails in `configure_plugin` or supports no format corrupts the heap (seen with
TensorRT-RTX 1.7 on any but the smallest graphs), and an exception in `clone` ends the process; so there a failure is
only noted and the build goes on. `Failures.check` turns the notes, with their nodes' names, into one error afterwards.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from .. import BuildError, ZondaError
from .cubins import CubinLibrary
from .launcher import Launch, Launcher
from .marker import Marker, Tensor

NAMESPACE, VERSION = "zonda", "1"


@dataclass(slots=True)
class Failures:
    """What went wrong inside callbacks, in order: (node, callback, error)."""

    entries: list[tuple[str, str, Exception]] = field(default_factory=list)

    def check(self, kind: type[ZondaError]) -> None:
        """Raise an error of this kind if anything was noted: the first failure in the message, the rest counted."""
        if self.entries:
            node, callback, error = self.entries[0]
            others = f" (and {len(self.entries) - 1} more)" if len(self.entries) > 1 else ""
            self.entries.clear()
            raise kind(f"plugin node {node}: {error}{others} [{callback}]") from error


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

    def dtype(self, kind: Any) -> str:
        """Our name of a TensorRT data type; TensorRT's own if the markers have none."""
        names = {"HALF": "fp16", "FLOAT": "fp32"}
        return names.get(kind.name, str(kind.name).lower())

    def tensor(self, description: Any) -> Tensor:
        """From a PluginTensorDesc."""
        return Tensor(tuple(description.dims), self.dtype(description.type))


def noted(silent: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A callback that notes its exception with the node's name; silent: and returns None instead of raising it."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any) -> Any:
            try:
                return method(self, *arguments)
            except Exception as error:
                self.around.failures.entries.append((self.node, method.__name__, error))
                if not silent:
                    raise
                return None

        return call

    return decorate


class PluginMethods:
    """The callbacks of a plugin. `registry.py` adds the base classes of the TensorRT at hand, named in `bases`."""

    bases: ClassVar[tuple[type[Any], ...]] = ()

    def __init__(self, node: str, marker: Marker, around: Surroundings) -> None:
        """The attributes that TensorRT reads, and the serialised fields, so that no later callback can fail on them."""
        for base in self.bases:
            base.__init__(self)
        self.node, self.marker, self.around = node, marker, around
        self.launch: Launch | None = None
        self.dtypes: tuple[str, ...] = ()  # of the inputs, once known
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

    @noted()
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Each output has the type of an input. Called by the parser first."""
        self.dtypes = tuple(self.around.dtype(kind) for kind in input_types)
        self.marker.check_dtypes(self.dtypes)
        return [input_types[source] for source in self.marker.output_sources()]

    @noted()
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:  # noqa: ARG002
        """Each output has the shape of an input. Called by the parser next: refuses what has no kernel."""
        if self.dtypes:
            shapes = [tuple(d.get_constant_value() if d.is_constant() else -1 for d in dims) for dims in inputs]
            self.require_kernel([Tensor(*pair) for pair in zip(shapes, self.dtypes, strict=True)])
        return [self.around.trt.DimsExprs(list(inputs[source])) for source in self.marker.output_sources()]

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:  # noqa: ARG002
        """Row-major tensors of the marker's types."""
        linear = in_out[position].desc.format == self.around.trt.TensorFormat.LINEAR
        return bool(linear and self.accepts(position, in_out) is not False)

    @noted(silent=True)
    def accepts(self, position: int, in_out: Sequence[Any]) -> bool:
        """Whether the types up to this position fit."""
        return self.marker.accepts(position, [self.around.dtype(d.desc.type) for d in in_out[: position + 1]])

    @noted(silent=True)
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Check again what the parser has let pass, with the shapes of a profile."""
        self.require_kernel([self.around.tensor(d.desc) for d in inputs])

    def require_kernel(self, tensors: Sequence[Tensor]) -> None:
        """Raise BuildError if there is no compiled kernel for these inputs."""
        self.around.library.require(self.around.library.capabilities, [self.marker.variant(tensors)])

    def get_valid_tactics(self) -> list[int]:
        """No choice of algorithm."""
        return []

    def get_workspace_size(self, *descriptions: Any) -> int:  # noqa: ARG002
        """None: everything stays in registers."""
        return 0

    def set_tactic(self, tactic: int) -> None:
        """No choice of algorithm."""

    def attach_to_context(self, resources: Any) -> Any:  # noqa: ARG002
        """A copy of its own for an execution context, its kernels loaded on this device.

        On a device that cannot run them `enqueue` will fail, which TensorRT takes well.
        """
        self.prepare()
        return self.clone()

    @noted(silent=True)
    def prepare(self) -> None:
        """Load the kernels now, so that no module is loaded while a graph is captured."""
        self.around.launcher().prepare(self.marker.kernel)

    @noted()
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Bind the launch: all that depends on shapes."""
        self.launch = self.bind([self.around.tensor(d) for d in inputs])

    @noted()
    def enqueue(
        self,
        input_descriptions: Sequence[Any],
        output_descriptions: Sequence[Any],  # noqa: ARG002
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,  # noqa: ARG002
        stream: int,
    ) -> None:
        """Launch on TensorRT's stream. An exception makes `execute_async_v3` return False."""
        if self.launch is None:
            self.launch = self.bind([self.around.tensor(d) for d in input_descriptions])
        self.launch([*inputs, *outputs], stream)

    def bind(self, tensors: Sequence[Tensor]) -> Launch:
        """The launch for inputs of known shape."""
        launcher = self.around.launcher()
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
