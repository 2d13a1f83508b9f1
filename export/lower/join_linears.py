"""Linears over the same input become one over their joined rows, which lie side by side in the weight file."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..functions import DOMAIN
from .rewrite import MICROSOFT, constant, extent, insert, producer, replace


@dataclass(frozen=True, slots=True)
class _Linear:
    """product: FusedMatMul or QLinear. weights: its initialisers. bias: of an Add that follows, or None."""

    product: ir.Node
    weights: Sequence[ir.Value]
    bias: ir.Value | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What linears that can be joined have in common."""
        settings = {name: attribute.value for name, attribute in self.product.attributes.items()}
        x = self.product.inputs[0]
        return self.product.op_type, id(x), tuple(sorted(settings.items())), len(self.weights), self.bias is None


def join_projections(graph: ir.Graph, packs: dict[str, tuple[str, ...]]) -> None:
    """The q, k and v linears of one GroupQueryAttention -> one, which it takes packed.

    Args:
        graph: with its attention fused.
        packs: grows by the joined weights and biases.
    """
    for node in list(graph):
        if node.op_type != "GroupQueryAttention":
            continue
        whole = _split_into(node.inputs[:3])
        if whole is None:
            whole = _join(graph, node, [_linear(graph, value) for value in node.inputs[:3]], packs)
        if whole is not None:
            for index, value in enumerate((whole, None, None)):
                node.replace_input_with(index, value)


def join_siblings(graph: ir.Graph, packs: dict[str, tuple[str, ...]]) -> None:
    """QLinears over one input (gate and up) -> one, and a Split: its activations are rounded once.

    Args:
        graph: whose projections are joined already.
        packs: grows by the joined weights.
    """
    siblings: dict[tuple[object, ...], list[_Linear]] = {}
    for node in graph:
        linear = _linear(graph, node.outputs[0]) if node.op_type == "QLinear" else None
        if linear is not None:
            siblings.setdefault(linear.kind, []).append(linear)
    for linears in siblings.values():
        if len(linears) > 1:
            first = linears[0].product
            joined = _join(graph, first, linears, packs)
            widths = [extent(linear.weights[0], 0) for linear in linears]
            name = f"widths_{'_'.join(map(str, widths))}"
            sizes = constant(graph, name, ir.tensor(widths, dtype=ir.DataType.INT64))
            parts = insert(graph, first, "Split", [joined, sizes], {"axis": -1}, outputs=len(linears))
            for linear, part in zip(linears, parts, strict=True):
                replace(linear.product.outputs[0], part)


def _split_into(pieces: Sequence[ir.Value | None]) -> ir.Value | None:
    """What a Split cuts into just these pieces, in this order; else None."""
    split = producer(pieces[0], "Split")
    return split.inputs[0] if split is not None and tuple(split.outputs) == tuple(pieces) else None


def _linear(graph: ir.Graph, value: ir.Value | None) -> _Linear | None:
    """The linear of the graph's weights that `value` is; else None."""
    bias = None
    add = producer(value, "Add")
    if add is not None and add.inputs[1] in graph.initializers.values():
        value, bias = add.inputs
    product = producer(value, "FusedMatMul", MICROSOFT) or producer(value, "QLinear", DOMAIN)
    if product is None:
        return None
    weights = [weight for weight in product.inputs[1:] if weight is not None and weight.is_initializer()]
    return _Linear(product, weights, bias) if len(weights) == len(product.inputs) - 1 else None


def _join(
    graph: ir.Graph, before: ir.Node, linears: Sequence[_Linear | None], packs: dict[str, tuple[str, ...]]
) -> ir.Value | None:
    """One linear in place of several, if they are alike; None if not."""
    found = [linear for linear in linears if linear is not None]
    if len(found) != len(linears) or any(linear.kind != found[0].kind for linear in found):
        return None
    first = found[0].product
    weights = [_pack(graph, members, packs) for members in zip(*(linear.weights for linear in found), strict=True)]
    (joined,) = insert(graph, before, first.op_type, [first.inputs[0], *weights], first.attributes, domain=first.domain)
    node = joined.producer()
    if node is not None:
        node.overload = first.overload
    joined.type, joined.shape = first.outputs[0].type, _with_width(first.outputs[0], extent(weights[0], 0))
    biases = [linear.bias for linear in found if linear.bias is not None]
    if biases:
        (joined,) = insert(graph, before, "Add", [joined, _pack(graph, biases, packs)])
    return joined


def _with_width(value: ir.Value, width: int) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([*value.shape[:-1], width])


def _pack(graph: ir.Graph, members: Sequence[ir.Value], packs: dict[str, tuple[str, ...]]) -> ir.Value:
    names = tuple(str(member.name) for member in members)
    name = f"{names[0]}.packed"
    rows = sum(extent(member, 0) for member in members)
    shape = ir.Shape([rows, *(extent(members[0], axis) for axis in range(1, len(members[0].shape or ())))])
    value = ir.Value(name=name, type=members[0].type, shape=shape)
    graph.initializers[name] = value
    packs[name] = names
    return value
