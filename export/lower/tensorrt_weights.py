"""Block-quantised weights in the graph for TensorRT, which dequantises signed codes of matrices by itself.

A linear's codes become INT4 or INT8, blocked along K, in the checkpoint's own (N, K): TensorRT recognises
DequantizeLinear, Transpose and MatMul, and multiplies without writing the weight out. It takes no zero points, so the
offsets are a product of their own with the sums of x over each block:

    x @ w.T = x @ (codes * scales).T + blocksum(x) @ offsets.T

What is gathered cannot be codes (TensorRT takes quantised constants in front of DequantizeLinear only), so a table
becomes rows of the target's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ...models.quantization import Form
from ..functions import DOMAIN
from .rewrite import extent, insert, replace


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight in blocks: the universal graph's initialisers that hold it."""

    codes: str
    scales: str
    offsets: str | None
    form: Form


@dataclass(frozen=True, slots=True)
class Weights:
    """What the initialisers of quantised weights became.

    tables: new initialiser -> the blocks that it has to be dequantised from. matrices: name of 8-bit codes or of their
    scales -> their blocks; 4-bit ones keep their scales. classes: class of weights -> what they are held in.
    """

    tables: Mapping[str, Blocks] = field(default_factory=dict)
    matrices: Mapping[str, Blocks] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)


def lower_weights(graph: ir.Graph, dtype: ir.DataType) -> Weights:
    """Rewrite `QLinear` and `QEmbedding`, in place.

    Args:
        graph: whose scales and offsets are `dtype` already.
        dtype: of activations, scales and tables.
    """
    tables: dict[str, Blocks] = {}
    matrices: dict[str, Blocks] = {}
    forms: set[str] = set()
    nodes = [node for node in graph if node.domain == DOMAIN]
    for node in [node for node in nodes if node.op_type == "QEmbedding"]:
        table = _blocks(node)
        name = f"{table.codes.removesuffix('.codes')}.weight"
        tables[name] = table
        _gather(graph, node, name, dtype)
    for node in [node for node in nodes if node.op_type == "QLinear"]:
        blocks = _blocks(node)
        forms.add(str(blocks.form))
        if blocks.form.bits == 8:
            matrices |= dict.fromkeys((blocks.codes, blocks.scales), blocks)
        _multiply(graph, node)
    classes = {"linear": "; ".join(sorted(forms))} if forms else {}
    if tables:
        classes["embedding"] = f"{dtype.name.lower()}, dequantised"
    return Weights(tables, matrices, classes)


def _form(node: ir.Node) -> Form:
    bits, block_size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    return Form(bits, block_size, offsets=_offsets(node) is not None)


def _offsets(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _blocks(node: ir.Node) -> Blocks:
    codes, scales, offsets = node.inputs[1], node.inputs[2], _offsets(node)
    assert codes is not None
    assert scales is not None
    return Blocks(str(codes.name), str(scales.name), None if offsets is None else str(offsets.name), _form(node))


def _gather(graph: ir.Graph, node: ir.Node, name: str, dtype: ir.DataType) -> None:
    """QEmbedding -> Gather of a table that is yet to be filled."""
    form = _form(node)
    shape = ir.Shape([extent(node.inputs[1], 0), extent(node.inputs[1], 1) * 8 // form.bits])
    table = graph.initializers.setdefault(name, ir.Value(name=name, type=ir.TensorType(dtype), shape=shape))
    (rows,) = insert(graph, node, "Gather", [table, node.inputs[0]], {"axis": 0})
    replace(node.outputs[0], rows)
    graph.remove(node, safe=True)


def _multiply(graph: ir.Graph, node: ir.Node) -> None:
    """QLinear -> a product with dequantised codes, and one of x's block sums with the offsets."""
    x, codes, scales = node.inputs[:3]
    form, offsets = _form(node), _offsets(node)
    assert codes is not None
    _sign(codes, form)
    attributes = {"axis": 1, "block_size": form.block_size}
    (weight,) = insert(graph, node, "DequantizeLinear", [codes, scales], attributes)
    product = _product(graph, node, x, weight)
    if offsets is not None:
        rank = len(x.shape) if x is not None and x.shape is not None else 3
        split = _constant(graph, [0] * (rank - 1) + [-1, form.block_size])
        (blocks,) = insert(graph, node, "Reshape", [x, split])
        (sums,) = insert(graph, node, "ReduceSum", [blocks, _constant(graph, [-1])], {"keepdims": 0})
        (product,) = insert(graph, node, "Add", [product, _product(graph, node, sums, offsets)])
    replace(node.outputs[0], product)
    graph.remove(node, safe=True)


def _sign(codes: ir.Value, form: Form) -> None:
    """The packed bytes are declared as what they will be written as: signed codes (N, K)."""
    if codes.dtype == ir.DataType.UINT8:
        rows, width = extent(codes, 0), extent(codes, 1)
        codes.type = ir.TensorType(ir.DataType.INT4 if form.bits == 4 else ir.DataType.INT8)
        codes.shape = ir.Shape([rows, width * 8 // form.bits])


def _product(graph: ir.Graph, before: ir.Node, x: ir.Value | None, weight: ir.Value) -> ir.Value:
    (transposed,) = insert(graph, before, "Transpose", [weight], {"perm": [1, 0]})
    return insert(graph, before, "MatMul", [x, transposed])[0]


def _constant(graph: ir.Graph, values: list[int]) -> ir.Value:
    name = f"int64_{'_'.join(map(str, values))}"
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)]), const_value=tensor)
    return graph.initializers.setdefault(name, value)
