"""Lowering for TensorRT and TensorRT-RTX: a static cache, 16-bit arithmetic, plugins where they are asked for.

Markers with a plugin stay one node each, residual add + RmsNorm become the plugin's `AddRmsNorm`; quantised weights
become what TensorRT dequantises itself (`tensorrt_weights.py`), and every other marker its body's nodes. Norms and
RoPE compute in float32 whichever way they run, and their gains and tables stay float32. The result holds no function:
a body could silently take a plugin's place. Nothing here imports TensorRT.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer

from ... import BuildError
from ...plugins_trt.nodes import read_node, variant_of
from ...plugins_trt.registry import PLUGINS
from ...runtime import contract
from ..functions import DOMAIN, LOWERED_MARKERS, MARKERS, register_schemas
from ..functions.marker import PLUGIN_ATTRIBUTES
from .gather_early import gather_early
from .rewrite import clean, insert, producer, replace
from .tensorrt_weights import Weights, lower_weights

Dtype = Literal["float16", "bfloat16"]

DTYPES: dict[str, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

_FLOAT32_INSIDE = ("RmsNorm", "QRmsNorm", "RoPE")
"""Markers whose plugin computes in float32 from 16-bit activations, and whose body is made to."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """model: the graph. weights: what its quantised weights became."""

    model: ir.Model
    weights: Weights


def parse_plugins(text: str) -> tuple[str, ...]:
    """Names of the plugins that `--plugins` asks for: `all`, `none`, or a list as `RmsNorm,RoPE`.

    Raises:
        BuildError: a name is none of a plugin.
    """
    if text in ("all", "none"):
        return tuple(PLUGINS) if text == "all" else ()
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PLUGINS]
    if unknown:
        raise BuildError(f"--plugins is all, none, or some of {', '.join(PLUGINS)}; found {', '.join(unknown)!r}")
    return tuple(name for name in PLUGINS if name in names)


def lower(universal: ir.Model, dtype: Dtype, rows: int, plugins: Collection[str] = tuple(PLUGINS)) -> Lowered:
    """Return the lowered copy of `universal`; weights without data stay without.

    Args:
        universal: of `export_universal`.
        dtype: of weights, activations and states; norm gains and RoPE tables stay float32, and so do the logits.
        rows: positions of the cache, capacity + max_chunk.
        plugins: markers that become plugin nodes; `AddRmsNorm` is the residual add fused into an RmsNorm.

    Raises:
        BuildError: a plugin cannot do what a node asks; the message names the node.
    """
    model = universal.clone()
    gather_early(model.graph)
    _narrow(model.graph, DTYPES[dtype], _float32_constants(model.graph))
    weights = lower_weights(model.graph, DTYPES[dtype])
    _fix_capacity(model.graph, rows)
    if "AddRmsNorm" in plugins:
        _fuse_residuals(model.graph)
    _widen_bodies(model.graph, DTYPES[dtype], plugins)
    _widen_logits(model.graph, DTYPES[dtype])
    for identifier in [i for i in model.functions if i[1] in plugins]:
        del model.functions[identifier]
    common_passes.InlinePass()(model)
    _simplify(model)
    _drop_absent(model.graph)
    _name(model.graph)
    _check_plugins(model.graph)
    return Lowered(model, weights)


def _simplify(model: ir.Model) -> None:
    """Infer every type and shape, compute what is static, and share what the layers have in common: one mask."""
    register_schemas((*MARKERS, *LOWERED_MARKERS))
    common_passes.NameFixPass()(model)
    onnxscript.optimizer.fold_constants(model)
    _share_constants(model.graph)
    common_passes.CommonSubexpressionEliminationPass()(model)
    clean(model)
    common_passes.ShapeInferencePass(check_type=False, strict_mode=True)(model)
    unknown = [node.name for node in model.graph for output in node.outputs if output.dtype is None and output.uses()]
    if unknown:
        raise BuildError(f"types cannot be inferred in the graph for TensorRT, first at the node {unknown[0]}")


def _share_constants(graph: ir.Graph) -> None:
    """One initialiser for equal constants; weights have no data yet and are left alone."""
    known: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None:
            first = known.setdefault((tensor.dtype, *tensor.shape.numpy(), tensor.tobytes()), value)
            if first is not value:
                ir.convenience.replace_all_uses_with(value, first)


def _float32_constants(graph: ir.Graph) -> set[ir.Value]:
    """Gains, their scales, and RoPE tables: what only the markers that compute in float32 read."""
    kept = set()
    for value in graph.initializers.values():
        readers = [use.node for use in value.uses()]
        if readers and all(n.domain == DOMAIN and n.op_type in _FLOAT32_INSIDE for n in readers):
            kept.add(value)
    return kept


def _narrow(graph: ir.Graph, dtype: ir.DataType, kept: set[ir.Value]) -> None:
    """Every float32 value becomes `dtype`, but those of `kept`."""
    produced = [output for node in graph for output in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *produced):
        if value.dtype == ir.DataType.FLOAT and value not in kept:
            value.type = ir.TensorType(dtype)  # not value.dtype: `universal` holds the same type object
            if value.const_value is not None:
                value.const_value = _cast(value.const_value, dtype)
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        constant = node.attributes.get("value") if node.op_type == "Constant" else None
        if constant is not None and constant.as_tensor().dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", _cast(constant.as_tensor(), dtype))
        if node.op_type == "Constant" and {"value_float", "value_floats"} & node.attributes.keys():
            raise AssertionError(f"{node.name}: a constant given as an attribute of its own kind")


def _cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32).astype(dtype.numpy()), dtype=dtype, name=tensor.name)


def _fix_capacity(graph: ir.Graph, rows: int) -> None:
    """The dynamic dimension `capacity` becomes `rows`: TensorRT updates a cache in place only if it is static."""
    produced = [output for node in graph for output in node.outputs]
    for value in (*graph.inputs, *produced):
        if value.shape is not None and any(str(d) == contract.CAPACITY for d in value.shape):
            value.shape = ir.Shape([rows if str(d) == contract.CAPACITY else d for d in value.shape])


def _widen_bodies(graph: ir.Graph, dtype: ir.DataType, plugins: Collection[str]) -> None:
    """Casts around markers that will be inlined but must compute in float32."""
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type not in _FLOAT32_INSIDE or node.op_type in plugins:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == dtype:
                node.replace_input_with(index, _cast_value(graph, node, value, ir.DataType.FLOAT))
        for output in node.outputs:
            _cast_output(graph, node, output, dtype)


def _widen_logits(graph: ir.Graph, dtype: ir.DataType) -> None:
    logits = next(value for value in graph.outputs if value.name == contract.LOGITS)
    node = logits.producer()
    if node is None:
        raise AssertionError("no node makes the logits")
    _cast_output(graph, node, logits, ir.DataType.FLOAT, computed=dtype)


def _cast_value(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    (cast,) = insert(graph, before, "Cast", [value], {"to": int(dtype)})
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    return cast


def _cast_output(
    graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType, computed: ir.DataType = ir.DataType.FLOAT
) -> None:
    """`output` will be computed in `computed`; its readers, and the graph's outputs, get it in `dtype`."""
    cast = ir.node("Cast", [output], {"to": int(dtype)})
    graph.insert_after(node, cast)
    (result,) = cast.outputs
    result.type, result.shape = ir.TensorType(dtype), output.shape
    name = output.name
    output.name = f"{name}.{computed.name.lower()}"
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    result.name = name
    output.type = ir.TensorType(computed)


def _drop_absent(graph: ir.Graph) -> None:
    """Plugin nodes lose their overload, and inputs and outputs that are absent: TensorRT's plugins have no such."""
    for node in plugin_nodes(graph):
        present = [value for value in node.inputs if value is not None]
        outputs = node.outputs[: len(read_node(node).outputs)]
        bare = ir.node(node.op_type, present, dict(node.attributes), domain=DOMAIN, num_outputs=len(outputs))
        graph.insert_before(node, bare)
        for old, new in zip(outputs, bare.outputs, strict=True):
            replace(old, new)
        graph.remove(node, safe=True)


def _residual_of(norm: ir.Node) -> ir.Node | None:
    """The addition of two values of one shape in front of a norm."""
    add = producer(norm.inputs[0], "Add")
    if add is None:
        return None
    a, b = add.inputs
    same = a is not None and b is not None and a.shape is not None and a.shape == b.shape and a.dtype == b.dtype
    return add if same else None


def _fuse_residuals(graph: ir.Graph) -> None:
    """Add + RmsNorm -> AddRmsNorm: the residual stream is read and written once."""
    for norm in [node for node in graph if node.op_type == "RmsNorm" and node.domain == DOMAIN]:
        add = _residual_of(norm)
        if add is None:
            continue
        attributes = {"eps": norm.attributes["eps"].as_float(), **PLUGIN_ATTRIBUTES}
        y, total = insert(
            graph, norm, "AddRmsNorm", [*add.inputs, norm.inputs[1]], attributes, domain=DOMAIN, outputs=2
        )
        replace(norm.outputs[0], y)
        replace(add.outputs[0], total)


def _name(graph: ir.Graph) -> None:
    """Names by operator and place, unique as TensorRT wants them; its log and the plan speak of nodes by them."""
    for index, node in enumerate(graph):
        node.name = f"{node.op_type}_{index}"
        for place, output in enumerate(node.outputs):
            if output.name != "" and not output.is_graph_output():
                output.name = f"{node.name}.{place}"


def _check_plugins(graph: ir.Graph) -> None:
    """Raise BuildError if a plugin has no kernel for its node."""
    for node in plugin_nodes(graph):
        try:
            variant_of(node)
        except BuildError as error:
            raise BuildError(f"{error}; leave it out: --plugins with the others, or none") from error


def plugin_nodes(nodes: Iterable[ir.Node]) -> Sequence[ir.Node]:
    """The nodes that must become plugins."""
    return [node for node in nodes if node.domain == DOMAIN]
