"""Linears over many tokens in 8 bits, for the prefill of the quality class `fast`.

    y[t, n] = peak[t] * scale[n] / 127 * sum_k (code[t, k] - 128) * weight[k, n]

A token's activations are rounded with a scale of its own, from their largest magnitude: one large value, of which there
are some in every model, then costs its own token precision and no other. The weights are rounded once more, at build,
a scale a row, and lie beside the blocks that they come from: the product of bytes wants them transposed.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...models.ops.blocks import dequantize
from ...runtime import contract
from ..functions import DOMAIN
from .rewrite import MICROSOFT, constant, extent, insert, replace

SHORTEST_PREFILL = 16
"""Tokens a row from which on a step is the prefill graph's. It is ahead from 4 on with VNNI, from 12 on without
(SmolLM2-135M); steps that verify a few drafted tokens are to compute what decoding computes.
"""
LIMIT = 127
"""Largest magnitude of a rounded weight or activation: symmetric, so that zero is exact."""
_ZERO_POINT = 128  # of activations: the product of uint8 by int8 is the one that processors have
_TOGETHER = 1 << 22  # weights that are dequantised at once


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight in 8 bits as derived from blocks. modules: whose rows it joins, in order."""

    modules: tuple[str, ...]
    bits: int
    block_size: int
    offsets: bool

    def derive(self, load: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """Round.

        Args:
            load: initialiser name -> tensor.

        Returns:
            weight (K, N) int8 and scales (N,) float32: weight[k, n] * scales[n] is within half of scales[n] of what
            the blocks say.
        """
        held = [[load(f"{module}.{part}") for part in self._parts] for module in self.modules]
        rows, columns = sum(len(codes) for codes, *_ in held), held[0][0].shape[1] * 8 // self.bits
        weight, scales = torch.empty(columns, rows, dtype=torch.int8), torch.empty(rows)
        done, together = 0, max(1, _TOGETHER // columns)
        for blocks in held:
            for start in range(0, len(blocks[0]), together):
                codes, factors, *offsets = (part[start : start + together] for part in blocks)
                floats = dequantize(codes, factors, offsets[0] if offsets else None, self.bits, self.block_size)
                step = floats.abs().amax(1) / LIMIT
                scaled = floats / step.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
                weight[:, done : done + len(step)] = scaled.round().clamp(-LIMIT, LIMIT).T.to(torch.int8)
                scales[done : done + len(step)] = step
                done += len(step)
        return weight, scales

    @property
    def _parts(self) -> tuple[str, ...]:
        return ("codes", "scales", "offsets") if self.offsets else ("codes", "scales")


Derived = Mapping[str, Int8Weight]
"""Initialiser that only the prefill graph has (`model.layers.0.mlp.up_proj.int8`) -> what it is made of."""


def derived_source(derived: Derived, load: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A function: initialiser of `derived` -> what the weight file holds, (K, N) int8 or the scales (N,) float32.

    A weight and its scales that are asked for one after the other are rounded once.

    Args:
        derived: of the lowering.
        load: initialiser name -> tensor, for the blocks.
    """
    round_once = functools.lru_cache(maxsize=1)(lambda weight: weight.derive(load))

    def read(name: str) -> Tensor:
        weight, scales = round_once(derived[name])
        return scales if name.endswith(_SCALES) else weight

    return read


_WEIGHT, _SCALES = ".int8", ".int8.scales"


def round_linears(graph: ir.Graph, packs: Mapping[str, tuple[str, ...]]) -> dict[str, Int8Weight]:
    """QLinear over all tokens of a step -> MatMulIntegerToFloat; one over the tokens that want logits stays.

    Args:
        graph: with its linears joined and the gather of tokens moved.
        packs: joined initialisers of the graph.

    Returns:
        The weights that the graph wants derived, by the name of their initialisers.
    """
    derived: dict[str, Int8Weight] = {}
    rounding = _Rounding(graph)
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    waiting: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if _is_over_all_tokens(node)]:
        x, codes = node.inputs[0], node.inputs[1]
        if x is None or codes is None:
            raise ValueError(f"{node.name}: QLinear lacks an input")
        if x not in rounded:
            rounded[x] = rounding.round(node, x, waiting.get(x))
        activations, steps = rounded[x]
        members = packs.get(str(codes.name), (str(codes.name),))
        made_of = Int8Weight(
            modules=tuple(name.rpartition(".")[0] for name in members),
            bits=node.attributes["bits"].as_int(),
            block_size=node.attributes["block_size"].as_int(),
            offsets=len(node.inputs) == 4,
        )
        first, rows = made_of.modules[0], extent(codes, 0)
        weight = _initializer(graph, f"{first}{_WEIGHT}", ir.DataType.INT8, extent(x, 2), rows)
        scales = _initializer(graph, f"{first}{_SCALES}", ir.DataType.FLOAT, rows)
        derived |= {str(weight.name): made_of, str(scales.name): made_of}
        one = constant(graph, "one_f32", ir.tensor(np.float32(1)))
        inputs = [activations, weight, one, scales, rounding.zero_point]
        (product,) = insert(graph, node, "MatMulIntegerToFloat", inputs, domain=MICROSOFT)
        gated = _only_gates(node.outputs[0])
        if gated is not None and gated not in waiting:
            waiting[gated] = steps
        else:
            (product,) = insert(graph, node, "Mul", [product, steps])
        replace(node.outputs[0], product)
    return derived


def _is_over_all_tokens(node: ir.Node) -> bool:
    x = node.inputs[0] if node.op_type == "QLinear" and node.domain == DOMAIN else None
    return (
        x is not None and x.shape is not None and len(x.shape) == 3 and x.shape[1] == ir.SymbolicDim(contract.SEQUENCE)
    )


def _only_gates(value: ir.Value) -> ir.Value | None:
    """The product that `value` is a factor of, if nothing else reads it and only rounded linears read the product.

    A factor a token may then wait: the codes of the product are the same without it, and the steps can take it.
    """
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or readers[0].op_type != "Mul" or value.is_graph_output():
        return None
    product = readers[0].outputs[0]
    return product if all(_is_over_all_tokens(use.node) for use in product.uses()) else None


class _Rounding:
    """Rounds activations, a step a token; what all of them need is computed once in front of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        first = graph[0]
        ids = next(value for value in graph.inputs if value.name == contract.INPUT_IDS)
        (self._shape,) = insert(graph, first, "Shape", [ids])
        (count,) = insert(graph, first, "Size", [ids])
        (count,) = insert(graph, first, "Reshape", [count, self._integers(1)])
        self.zero_point = constant(graph, "int8_zero_point", ir.tensor(np.uint8(_ZERO_POINT)))
        (self._zero_points,) = insert(graph, first, "Expand", [self.zero_point, count])
        self._unit = constant(graph, "int8_unit", ir.tensor(np.float32(1 / LIMIT)))
        self._least = constant(graph, "int8_least_step", ir.tensor(np.finfo(np.float32).tiny))
        self._shapes: dict[int, ir.Value] = {}

    def round(self, before: ir.Node, x: ir.Value, factor: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Codes (B, S, K) uint8 of x, and the steps (B, S, 1) between them, times a factor that x still lacks."""
        graph, width = self._graph, extent(x, 2)
        (tokens,) = insert(graph, before, "Reshape", [x, self._integers(-1, width)])
        (magnitudes,) = insert(graph, before, "Abs", [tokens])
        (peaks,) = insert(graph, before, "ReduceMax", [magnitudes, self._integers(1)], {"keepdims": 0})
        (steps,) = insert(graph, before, "Mul", [peaks, self._unit])
        (steps,) = insert(graph, before, "Add", [steps, self._least])  # of zeros, too, there is a step
        (codes,) = insert(graph, before, "QuantizeLinear", [tokens, steps, self._zero_points], {"axis": 0})
        (codes,) = insert(graph, before, "Reshape", [codes, self._shape_of(before, width)])
        (steps,) = insert(graph, before, "Reshape", [steps, self._shape_of(before, 1)])
        if factor is not None:
            (steps,) = insert(graph, before, "Mul", [steps, factor])
        return codes, steps

    def _shape_of(self, before: ir.Node, width: int) -> ir.Value:
        """(B, S, width)."""
        if width not in self._shapes:
            inputs = [self._shape, self._integers(width)]
            (self._shapes[width],) = insert(self._graph, before, "Concat", inputs, {"axis": 0})
        return self._shapes[width]

    def _integers(self, *values: int) -> ir.Value:
        name = f"integers_{'_'.join(map(str, values))}"
        return constant(self._graph, name, ir.tensor(list(values), dtype=ir.DataType.INT64))


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, *shape: int) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.initializers[name] = value
    return value
