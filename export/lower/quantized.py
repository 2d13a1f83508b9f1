"""Block-quantised weights for ONNX Runtime on the CPU: QLinear -> MatMulNBits, QEmbedding -> GatherBlockQuantized.

Both read the codes of the universal graph as they are, with the middle of the range for zero. MatMulNBits rounds the
activations to 8 bits, with a scale a block, and has no fast form for offsets, so they ride along as columns:

    x @ (s * c + o).T = x @ (s * c).T + sums(x) @ o.T

The sums of x over each block are appended to x, and to the rows of the weight the offsets, rounded to codes with
scales of their own. In 4 bits one rounding is coarse, so what it leaves is rounded again into as many columns more. A
weight's rows lie wide in the file; the universal graph cuts the columns off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...models.ops.blocks import pack
from ..functions import DOMAIN
from .rewrite import MICROSOFT, constant, extent, insert, replace

_ACCURACY_LEVEL = 4  # activations in 8 bits; the levels below cost ten times as much
_SMALLEST_BLOCK = 16  # that MatMulNBits takes
_LARGEST_SUMMING_MATRIX = 1 << 17  # floats: while it stays in a core's cache, one product is faster than three nodes


@dataclass(frozen=True, slots=True)
class Correction:
    """The columns for the offsets of a weight: bits and block_size are the weight's, `offsets` how many a row has."""

    bits: int
    block_size: int
    offsets: int

    @property
    def parts(self) -> int:
        """How often the offsets are rounded; what 8 bits leave is not worth a column."""
        return 2 if self.bits == 4 else 1

    @property
    def blocks(self) -> int:
        """Blocks a part."""
        return -(-self.offsets // self.block_size)

    @property
    def columns(self) -> int:
        """Columns of all parts."""
        return self.parts * self.blocks * self.block_size

    @property
    def code_bytes(self) -> int:
        """Bytes of their codes a row."""
        return self.columns * self.bits // 8

    def quantize(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Round the offsets (N, K / block_size).

        Returns:
            codes (N, columns * bits / 8) uint8, packed, and scales (N, columns / block_size) float32: the first
            rounding of all offsets, then the second.
        """
        middle = 1 << self.bits - 1
        left = torch.zeros(len(offsets), self.blocks, self.block_size)
        left.view(len(offsets), -1)[:, : self.offsets] = offsets
        codes, scales = [], []
        for _ in range(self.parts):
            scale = left.abs().amax(-1, keepdim=True) / (middle - 1)
            code = (left / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
            left = left - code * scale
            codes.append(pack((code + middle).to(torch.uint8).flatten(1), self.bits))
            scales.append(scale.squeeze(-1))
        return torch.cat(codes, 1), torch.cat(scales, 1)


Corrections = Mapping[str, Correction]
"""Module whose weight's rows are wide (`model.layers.0.mlp.up_proj`) -> what they end in."""


def as_written(name: str, tensor: Tensor, load: Callable[[str], Tensor], corrections: Corrections) -> Tensor:
    """What the weight file holds of an initialiser: codes and scales with their correction, all else as it is.

    Args:
        name: of the initialiser.
        tensor: the initialiser as the universal graph's nodes read it.
        load: name -> tensor, for the offsets.
        corrections: of the lowering.
    """
    module, _, part = name.rpartition(".")
    if module not in corrections or part not in ("codes", "scales"):
        return tensor
    codes, scales = corrections[module].quantize(load(f"{module}.offsets"))
    return torch.cat((tensor, codes if part == "codes" else scales), 1)


def widen(graph: ir.Graph, corrections: Corrections) -> None:
    """Let the codes and scales in `graph` have their correction in the file, and cut it off for those who read them."""
    for module, correction in corrections.items():
        for part, more in (("codes", correction.code_bytes), ("scales", correction.columns // correction.block_size)):
            stored = graph.initializers[f"{module}.{part}"]
            readers = list(stored.uses())
            rows, width = extent(stored, 0), extent(stored, 1)
            stored.shape = ir.Shape([rows, width + more])
            bounds = [_integers(graph, value) for value in (0, width, 1)]
            (own,) = insert(graph, graph[0], "Slice", [stored, *bounds])
            own.name, own.type, own.shape = f"{module}.{part}.own", stored.type, ir.Shape([rows, width])
            for node, index in readers:
                node.replace_input_with(index, own)


def fuse_quantized(graph: ir.Graph, packs: dict[str, tuple[str, ...]]) -> dict[str, Correction]:
    """QLinear -> MatMulNBits, QEmbedding without offsets -> GatherBlockQuantized, where they fit.

    Args:
        graph: whose weights without data are the universal graph's, or packs of them.
        packs: grows by the new views of the weights.

    Returns:
        Whose rows have to be wide.
    """
    corrections: dict[str, Correction] = {}
    embeddings = []
    extended: dict[tuple[ir.Value, Correction], ir.Value] = {}
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type not in ("QLinear", "QEmbedding"):
            continue
        bits, block_size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        if block_size < _SMALLEST_BLOCK or block_size & block_size - 1:
            continue
        if node.op_type == "QLinear":
            _fuse_linear(graph, node, bits, block_size, packs, corrections, extended)
        elif len(node.inputs) == 3:
            attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
            ids, codes, scales = node.inputs
            (rows,) = insert(graph, node, "GatherBlockQuantized", [codes, ids, scales], attributes, domain=MICROSOFT)
            replace(node.outputs[0], rows)
        else:
            embeddings.append(node)
    for node in embeddings:
        module = str(node.inputs[1] and node.inputs[1].name).rpartition(".")[0]
        if module in corrections:
            _gather_rows(graph, node, corrections[module])
    return corrections


def _gather_rows(graph: ir.Graph, node: ir.Node, correction: Correction) -> None:
    """A table that a head reads with its correction: QEmbedding of rows that are gathered and cut before."""
    ids, *parts = node.inputs
    (flat,) = insert(graph, node, "Reshape", [ids, _integers(graph, -1)])
    gathered = []
    for part, more in zip(parts, (correction.code_bytes, correction.columns // correction.block_size, 0), strict=True):
        assert part is not None
        width = extent(part, 1)
        (rows,) = insert(graph, node, "Gather", [part, flat], {"axis": 0})
        if more:
            part.shape = ir.Shape([extent(part, 0), width + more])
            (rows,) = insert(graph, node, "Slice", [rows, *(_integers(graph, value) for value in (0, width, 1))])
        gathered.append(rows)
    (count,) = insert(graph, node, "Size", [ids])
    bounds = [constant(graph, f"scalar_{value}", ir.tensor(value, dtype=ir.DataType.INT64)) for value in (0, 1)]
    (order,) = insert(graph, node, "Range", [bounds[0], count, bounds[1]])
    (shape,) = insert(graph, node, "Shape", [ids])
    (order,) = insert(graph, node, "Reshape", [order, shape])
    for index, value in enumerate((order, *gathered)):
        node.replace_input_with(index, value)


def _fuse_linear(
    graph: ir.Graph,
    node: ir.Node,
    bits: int,
    block_size: int,
    packs: dict[str, tuple[str, ...]],
    corrections: dict[str, Correction],
    extended: dict[tuple[ir.Value, Correction], ir.Value],
) -> None:
    x, codes, scales = node.inputs[:3]
    if x is None or codes is None or scales is None:
        raise ValueError(f"{node.name}: QLinear lacks an input")
    if x.shape is None or len(x.shape) != 3:
        return
    rows, blocks = extent(scales, 0), extent(scales, 1)
    if len(node.inputs) == 4:
        correction = Correction(bits, block_size, blocks)
        x = extended.get((x, correction)) or extended.setdefault((x, correction), _extend(graph, node, x, correction))
        blocks += correction.parts * correction.blocks
        corrections |= {name.rpartition(".")[0]: correction for name in _members(codes, packs)}
    inputs = [
        x,
        _view(graph, codes, [rows, blocks, block_size * bits // 8], packs),
        _view(graph, scales, [rows, blocks], packs),
    ]
    attributes = {
        "K": blocks * block_size,
        "N": rows,
        "bits": bits,
        "block_size": block_size,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    (product,) = insert(graph, node, "MatMulNBits", inputs, attributes, domain=MICROSOFT)
    replace(node.outputs[0], product)


def _extend(graph: ir.Graph, before: ir.Node, x: ir.Value, correction: Correction) -> ir.Value:
    """x (B, S, K) with the sums of its blocks behind it, once a part, each padded to whole blocks."""
    offsets, block_size = correction.offsets, correction.block_size
    padded = correction.blocks * block_size
    if offsets * block_size * padded <= _LARGEST_SUMMING_MATRIX:
        ones = np.repeat(np.eye(offsets, padded, dtype=np.float32), block_size, axis=0)
        matrix = constant(graph, f"sums_of_{offsets}_blocks_of_{block_size}", ir.tensor(ones))
        (sums,) = insert(graph, before, "MatMul", [x, matrix])
    else:
        (blocks,) = insert(graph, before, "Reshape", [x, _integers(graph, 0, 0, offsets, block_size)])
        (sums,) = insert(graph, before, "ReduceSum", [blocks, _integers(graph, 3)], {"keepdims": 0})
        if padded > offsets:
            (sums,) = insert(graph, before, "Pad", [sums, _integers(graph, 0, 0, 0, 0, 0, padded - offsets)])
    (wide,) = insert(graph, before, "Concat", [x, *[sums] * correction.parts], {"axis": -1})
    return wide


def _view(graph: ir.Graph, weight: ir.Value, shape: list[int], packs: dict[str, tuple[str, ...]]) -> ir.Value:
    """The bytes of an initialiser, or of a pack, in another shape."""
    name = f"{weight.name}.blocks"
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, type=weight.type, shape=ir.Shape(shape))
        packs[name] = _members(weight, packs)
    return graph.initializers[name]


def _members(weight: ir.Value, packs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return packs.get(str(weight.name), (str(weight.name),))


def _integers(graph: ir.Graph, *values: int) -> ir.Value:
    name = f"integers_{'_'.join(map(str, values))}"
    return constant(graph, name, ir.tensor(list(values), dtype=ir.DataType.INT64))
