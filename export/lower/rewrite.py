"""Small tools to walk and rewrite an onnx_ir graph, shared by the lowerings."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

MICROSOFT = "com.microsoft"


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is of that operator; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def extent(value: ir.Value | None, axis: int) -> int:
    """The size of a static dimension."""
    if value is None or value.shape is None or not isinstance(size := value.shape[axis], int):
        raise ValueError(f"{value} has no static dimension {axis}")
    return size


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
) -> Sequence[ir.Value]:
    """Add a node in front of `before`; return its outputs, unnamed and untyped."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    graph.insert_before(before, node)
    return node.outputs


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, graph outputs included, read `new`, which takes its name, type and shape."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initialiser `name`, made of `tensor` if it is not there yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def drop_unused(model: ir.Model) -> None:
    """Drop nodes and initialisers that nothing uses: what a rewriting replaced still reads its inputs."""
    common_passes.RemoveUnusedNodesPass()(model)


def clean(model: ir.Model) -> None:
    """Drop nodes, initialisers, functions and opsets that nothing uses any more, and name what is left by place."""
    drop_unused(model)
    common_passes.RemoveUnusedFunctionsPass()(model)
    common_passes.TopologicalSortPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
