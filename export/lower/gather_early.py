"""Compute only what is asked for: the gather of the tokens that want logits moves in front of the last layer's MLP.

The last layer's keys and values need every token; what comes after its attention is needed only for the tokens whose
logits are read. In a prefill of one prompt that is one token instead of all, and the rest of the layer is nearly free.
"""

import onnx_ir as ir

from ...runtime import contract
from ..functions import DOMAIN
from .rewrite import MICROSOFT, extent, insert

_TOKENWISE = {
    *((op, "") for op in ("Add", "Sub", "Mul", "Div", "Neg", "MatMul", "Cast", "Sigmoid", "Tanh", "Erf", "Gelu")),
    *((op, "") for op in ("LayerNormalization", "SimplifiedLayerNormalization")),
    *((op, MICROSOFT) for op in ("FusedMatMul", "QuickGelu", "SkipSimplifiedLayerNormalization")),
    *((op, DOMAIN) for op in ("RmsNorm", "QRmsNorm", "QLinear", "MoE")),
}
"""Operators that compute each token (B, S, …) from the same token of their inputs; Split does along the last axis."""


def gather_early(graph: ir.Graph) -> None:
    """Move GatherElements over tokens towards the inputs, through everything that computes token by token."""
    for gather in [node for node in graph if node.op_type == "GatherElements" and node.domain == ""]:
        positions = _positions(gather)
        if positions is None:
            continue
        region = _region(graph, gather)
        if not region:
            continue
        gathered: dict[ir.Value, ir.Value] = {}
        for node in reversed(region):  # in the order of execution
            for index, value in enumerate(node.inputs):
                if value is None or value.producer() in region or not _has_tokens(value):
                    continue
                if value not in gathered:
                    gathered[value] = _gather(graph, region[-1], value, positions)
                node.replace_input_with(index, gathered[value])
            for output in node.outputs:
                output.shape = _asked_for(output)
        result = gather.inputs[0]
        if result is not None:
            ir.convenience.replace_all_uses_with(gather.outputs[0], result)


def _positions(gather: ir.Node) -> ir.Value | None:
    """logit_positions with a last dimension of 1, if that is what is gathered; the pattern of `gather_tokens`."""
    expand = gather.inputs[1].producer() if gather.inputs[1] is not None else None
    positions = expand.inputs[0] if expand is not None and expand.op_type == "Expand" else None
    unsqueeze = positions.producer() if positions is not None else None
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.inputs[0] is None:
        return None
    return positions if unsqueeze.inputs[0].name == contract.LOGIT_POSITIONS else None


def _region(graph: ir.Graph, gather: ir.Node) -> list[ir.Node]:
    """Token-wise nodes whose results nobody but the gather reads, last first."""
    region: list[ir.Node] = []
    inside = {gather}
    for node in reversed(graph):
        readers = {use.node for output in node.outputs for use in output.uses()}
        kept = any(output.is_graph_output() for output in node.outputs)
        if _is_tokenwise(node) and readers and readers <= inside and not kept:
            region.append(node)
            inside.add(node)
    return region


def _is_tokenwise(node: ir.Node) -> bool:
    if node.op_type == "Split" and node.domain == "":
        return node.attributes["axis"].as_int() in (-1, 2)
    return (node.op_type, node.domain) in _TOKENWISE


def _has_tokens(value: ir.Value) -> bool:
    """Whether the value is (B, S, …): an input of a token-wise node, not a weight."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[1] == ir.SymbolicDim(contract.SEQUENCE)


def _asked_for(value: ir.Value) -> ir.Shape | None:
    if not _has_tokens(value) or value.shape is None:
        return value.shape
    return ir.Shape([value.shape[0], contract.NUM_LOGITS, value.shape[2]])


def _gather(graph: ir.Graph, before: ir.Node, value: ir.Value, positions: ir.Value) -> ir.Value:
    """The tokens of `value` that are asked for."""
    width = extent(value, 2)
    name = f"gather_width_{width}"
    if name not in graph.initializers:
        tensor = ir.tensor([1, 1, width], dtype=ir.DataType.INT64, name=name)
        constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([3]), const_value=tensor)
        graph.initializers[name] = constant
    (indices,) = insert(graph, before, "Expand", [positions, graph.initializers[name]])
    (tokens,) = insert(graph, before, "GatherElements", [value, indices], {"axis": 1})
    tokens.type, tokens.shape = value.type, _asked_for(value)
    return tokens
