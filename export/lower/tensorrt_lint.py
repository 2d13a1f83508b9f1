"""What TensorRT would take and compute wrongly, refused with the node's name before TensorRT sees the graph.

Each rule stands for something that TensorRT-RTX 1.7 was seen to do: ignore an input, expand a type, mask another
triangle, or stop without saying where. The graph must have its types and shapes inferred.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from ... import BuildError
from ...plugins_trt.nodes import variant_of
from ...plugins_trt.registry import PLUGINS
from ..functions import DOMAIN
from ..functions.marker import PLUGIN_ATTRIBUTES

Finding = tuple[str, str]
"""(name of the node or tensor, what is wrong and what to do)."""

_OPSET = 24
_UNSUPPORTED = ("DynamicQuantizeLinear",)


def lint(model: ir.Model) -> None:
    """Refuse `model` if it holds a trap.

    Args:
        model: the graph that TensorRT is to be given, types and shapes inferred; constants may lie in a file.

    Raises:
        BuildError: naming each node and what is wrong with it.
    """
    findings = [finding for rule in RULES for finding in rule(model)]
    if findings:
        lines = "".join(f"\n  {name}: {what}" for name, what in findings)
        raise BuildError(f"TensorRT would not compute what this graph says:{lines}")


def ignored_lengths(model: ir.Model) -> Iterator[Finding]:
    """Attention's `nonpad_kv_seqlen` is read by no TensorRT."""
    for node in _operators(model, "Attention"):
        if _input(node, 6) is not None:
            yield _name(node), "nonpad_kv_seqlen is silently ignored: mask with an explicit bool mask"


def causal_with_cache(model: ir.Model) -> Iterator[Finding]:
    """`is_causal` aligns the triangle with the first key, not with the last."""
    for node in _operators(model, "Attention"):
        query, key = _extent(_input(node, 0), 2), _extent(_input(node, 1), 2)
        if _integer(node, "is_causal") and (query is None or query != key):
            yield _name(node), "is_causal masks from the first key, wrong with a cache: use an explicit bool mask"


def attention_forms(model: ir.Model) -> Iterator[Finding]:
    """Attention in float32, with its own cache, or with a softcap."""
    for node in _operators(model, "Attention"):
        dtype = _dtype(_input(node, 0))
        if dtype is None:
            yield _name(node), "the type of q is not known: infer the graph's types first"
        elif dtype == ir.DataType.FLOAT and not _integer(node, "TRT_decomposable"):
            yield _name(node), "float32 attention is not fused: build with fp16 or bf16"
        if _input(node, 4) is not None or _input(node, 5) is not None or len(node.outputs) > 1:
            yield _name(node), "attention with past and present of its own does not build: update the cache outside"
        softcap = node.attributes.get("softcap")
        if softcap is not None and softcap.as_float() != 0:
            yield _name(node), "softcap does not build: write it as operators"


def unsigned_constants(model: ir.Model) -> Iterator[Finding]:
    """UINT8 constants become INT32, and UINT4 ones fail."""
    for name, value in _constants(model):
        dtype = value if isinstance(value, ir.DataType) else value.dtype
        if dtype in (ir.DataType.UINT8, ir.DataType.UINT4):
            yield name, f"a {dtype.name} constant expands to INT32: store signed INT8 or INT4 codes"


def zero_points(model: ir.Model) -> Iterator[Finding]:
    """INT4 weights are dequantised as if their zero points were 0."""
    for node in _operators(model, "DequantizeLinear"):
        zero_point, codes = _input(node, 2), _input(node, 0)
        if zero_point is None or _dtype(codes) not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        tensor = _value_of(zero_point)
        if tensor is None:
            yield _name(node), "the zero points are not constant, and INT4 weights must have none"
        elif np.any(tensor.numpy() != 0):
            yield _name(node), "INT4 zero points are not 0: split them off as an offset of each block"


def colliding_names(model: ir.Model) -> Iterator[Finding]:
    """TensorRT goes by names: of nodes, of tensors, and of operators without their domain."""
    nodes = Counter(node.name for node in model.graph)
    for name, count in nodes.items():
        if not name:
            yield "a node without a name", f"{count} nodes have no name: layers cannot be told apart"
        elif count > 1:
            yield name, f"{count} nodes have this name"
    tensors = Counter(o.name for node in model.graph for o in node.outputs if o.name)
    tensors.update(value.name for value in (*model.graph.inputs, *model.graph.initializers.values()) if value.name)
    for name, count in tensors.items():
        if count > 1 and not (count == 2 and _is_default(model, name)):
            yield str(name), f"{count} tensors have this name"
    for node in model.graph:
        if node.domain and onnx.defs.has(node.op_type, _OPSET, ""):
            yield _name(node), f"TensorRT takes {node.domain}.{node.op_type} for its own {node.op_type}: rename it"
    for domain, name, _ in model.functions:
        yield f"{domain}.{name}", "a function body can silently take a plugin's place: inline it"


def _is_default(model: ir.Model, name: str | None) -> bool:
    """Whether a graph input has an initialiser as its default value: one tensor, listed twice."""
    return any(value.name == name for value in model.graph.inputs) and name in model.graph.initializers


def dynamic_capacity(model: ir.Model) -> Iterator[Finding]:
    """A cache is updated in place only if its length is static, and TensorScatter wants int64 indices."""
    for node in _operators(model, "TensorScatter"):
        cache, index = _input(node, 0), _input(node, 2)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -2
        if _extent(cache, axis) is None:
            yield _name(node), "the capacity of the cache is dynamic: lower it to a static one"
        if index is not None and _dtype(index) != ir.DataType.INT64:
            yield _name(node), "the write indices are not INT64"


def plugin_nodes(model: ir.Model) -> Iterator[Finding]:
    """A plugin that is not found, or attributes that it does not declare, vanish without a word."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        if node.op_type not in PLUGINS:
            yield _name(node), f"{node.op_type} has no plugin: inline its body"
            continue
        declared = {field.name for field in PLUGINS[node.op_type].fields}
        extra = sorted(node.attributes.keys() - declared - PLUGIN_ATTRIBUTES.keys())
        if extra:
            yield _name(node), f"{', '.join(extra)}: no attribute of the plugin {node.op_type}, so it would vanish"
        for key, wanted in PLUGIN_ATTRIBUTES.items():
            found = node.attributes.get(key)
            if found is None or found.as_string() != wanted:
                yield _name(node), f"{key} must be {wanted!r}, or the plugin is not found"
        try:
            variant_of(node)
        except BuildError as error:
            yield _name(node), str(error).removeprefix(f"{node.name}: ")


def operators(model: ir.Model) -> Iterator[Finding]:
    """What does not build, and stops without a name."""
    for node in model.graph:
        if node.domain == "" and node.op_type in _UNSUPPORTED:
            yield _name(node), f"TensorRT has no {node.op_type}"
        if node.domain == "" and node.op_type == "MatMul":
            types = {_dtype(value) for value in node.inputs}
            if len(types) > 1:
                names = " and ".join(sorted(kind.name if kind else "unknown" for kind in types))
                yield _name(node), f"a product of {names}: cast one of them"


RULES: tuple[Callable[[ir.Model], Iterator[Finding]], ...] = (
    ignored_lengths,
    causal_with_cache,
    attention_forms,
    unsigned_constants,
    zero_points,
    colliding_names,
    dynamic_capacity,
    plugin_nodes,
    operators,
)


def _operators(model: ir.Model, op_type: str) -> Sequence[ir.Node]:
    """By the bare name, as TensorRT looks at it."""
    return [node for node in model.graph if node.op_type == op_type]


def _constants(model: ir.Model) -> Iterator[tuple[str, ir.Value | ir.DataType]]:
    yield from model.graph.initializers.items()
    for node in model.graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            yield _name(node), node.attributes["value"].as_tensor().dtype


def _value_of(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    if value.const_value is None and node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return value.const_value


def _name(node: ir.Node) -> str:
    return node.name or f"a {node.op_type} without a name"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return value.dtype if value is not None else None


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _extent(value: ir.Value | None, axis: int) -> int | None:
    """The size of a dimension of a tensor, None if it is not static."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
