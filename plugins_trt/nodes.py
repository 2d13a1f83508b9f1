"""Which kernels a graph needs: its marker nodes, read from onnx_ir (which is not imported here)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import BuildError
from .cubins import Variant
from .marker import Marker, Tensor
from .plugin import NAMESPACE
from .registry import PLUGINS

if TYPE_CHECKING:
    import onnx_ir

_DTYPES = {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT": "fp32", "INT8": "int8", "INT64": "int64"}


def is_plugin_node(node: "onnx_ir.Node") -> bool:
    """Whether a plugin exists for this node's operator."""
    return node.domain == NAMESPACE and node.op_type in PLUGINS


def read_node(node: "onnx_ir.Node") -> Marker:
    """The marker with the node's attribute values.

    Raises:
        BuildError: an attribute is missing, of another kind, or out of range; the message begins with the node.
    """
    marker = PLUGINS[node.op_type]
    values: dict[str, float] = {}
    for field in marker.fields:
        attribute = node.attributes.get(field.name)
        if attribute is None or type(attribute.value) is not field.kind:
            found = "nothing" if attribute is None else repr(attribute.value)
            raise BuildError(f"{node.name}: {node.op_type} wants one {field.kind.__name__} {field.name}, not {found}")
        values[field.name] = attribute.value
    try:
        return marker.create(values)
    except BuildError as error:
        raise BuildError(f"{node.name}: {error}") from error


def variant_of(node: "onnx_ir.Node") -> Variant:
    """The kernel variant that the node's plugin will ask for.

    Raises:
        BuildError: as `read_node`, or a type or shape is unknown or does not fit.
    """
    marker = read_node(node)
    tensors = []
    for value in node.inputs:
        if value is None:
            raise BuildError(f"{node.name}: TensorRT's plugins cannot have an absent input: leave it out")
        if value.dtype is None or value.shape is None:
            raise BuildError(f"{node.name}: {value.name} has no known type and shape: infer the graph's shapes first")
        shape = tuple(d if isinstance(d, int) else -1 for d in value.shape.dims)
        tensors.append(Tensor(shape, _DTYPES.get(value.dtype.name, value.dtype.name.lower())))
    try:
        return marker.variant(tensors)
    except BuildError as error:
        raise BuildError(f"{node.name}: {error}") from error


def variants_of(nodes: Iterable["onnx_ir.Node"]) -> tuple[Variant, ...]:
    """The distinct variants of all plugin nodes, in graph order; other nodes are passed over."""
    return tuple(dict.fromkeys(variant_of(node) for node in nodes if is_plugin_node(node)))
