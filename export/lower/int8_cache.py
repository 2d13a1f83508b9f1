"""The KV cache in 8 bits: `state = code * scale`, a scale a layer, a head and a channel, fixed at build.

Short steps leave codes to GroupQueryAttention, which multiplies by them as they are. Its loops go row by row, so over
many tokens they are slower than a product of matrices: a long step makes floats of the codes that are cached, attends in
float32 over them and what is new, and rounds the result back. There are two branches of an `If` a layer, in one graph:
the weights are held once, and choosing costs a few microseconds.

In the long branch scales never touch the cache. They go over to what is multiplied with it:

    q · k = (q * scale) · (k / scale)        out = (p · (v / scale)) * scale

which lets the operator rotate after that, for the two channels that RoPE rotates together have one scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ... import BuildError
from ...runtime import contract
from .rewrite import MICROSOFT, constant, extent, insert, replace

SHORTEST_LONG = 8
"""Tokens a row from which on a step takes the branch that attends in float32."""
LIMIT = 127
"""Largest magnitude of a code."""
_HEADROOM = {"key": 1.1, "value": 1.35}
"""Scales are this much wider than what calibration saw: rounding is coarser by it, and clipping hurts more. Values have
longer tails than the lengths of keys' pairs (measured: the largest of 1,500 tokens is up to 3 times that of 250).
"""
_NARROWEST = 1 / 32
"""Of a head's widest scale: a channel that was silent on the few tokens of a calibration may speak on others."""
_KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _TOTAL = 1, 2, 3, 4, 6
_COS, _K_SCALE, _V_SCALE = 7, 12, 13

Scales = Mapping[str, NDArray[np.float32]]
"""State, by the name of its input (`past_key_values.0.key`) -> (Hkv, D)."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One GroupQueryAttention: the operator, its states and the scales (Hkv, D) of each."""

    node: ir.Node
    key_scales: NDArray[np.float32]
    value_scales: NDArray[np.float32]

    def of_queries(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Each query head's numbers of the head it reads: (Hkv, D) -> (Hq * D,)."""
        group = self.node.attributes["num_heads"].as_int() // len(scales)
        return scales.repeat(group, axis=0).reshape(-1)


def calibrate(graph: ir.Graph, states: Sequence[Sequence[NDArray[np.floating]]]) -> dict[str, NDArray[np.float32]]:
    """Scales from what an exact model has cached.

    A value's is its channel's largest magnitude over 127. The two channels that RoPE rotates into one another share the
    largest length of that pair, which no position changes.

    Args:
        graph: lowered, with float states.
        states: of each row the state tensors (Hkv, length, D), in the contract's order.

    Raises:
        BuildError: a layer's attention is not the fused operator, which alone can hold codes.
    """
    names = [value.name for value in graph.inputs if value.name and value.name.startswith("past_key_values.")]
    fused = {name: node for node in _attentions(graph) for name in _states_of(node)}
    scales = {}
    for index, name in enumerate(names):
        if name not in fused:
            raise BuildError(f"--kv int8 is for layers that run as GroupQueryAttention; that of {name} does not fit it")
        peaks = np.max([np.abs(_rotated_lengths(fused[name], name, row[index])).max(1) for row in states], axis=0)
        floor = np.maximum(peaks.max(1, keepdims=True) * _NARROWEST, np.finfo(np.float32).tiny * LIMIT)
        headroom = _HEADROOM["key" if name == _states_of(fused[name])[0] else "value"]
        scales[name] = (np.maximum(peaks, floor) * (headroom / LIMIT)).astype(np.float32)
    return scales


def _rotated_lengths(node: ir.Node, name: str, state: NDArray[np.floating]) -> NDArray[np.floating]:
    """The state (Hkv, length, D), where the operator rotates a pair of channels the length of the pair in both."""
    if name != _states_of(node)[0] or not node.attributes["do_rotary"].as_int():
        return state
    half = extent(node.inputs[_COS], 1)
    if node.attributes["rotary_interleaved"].as_int():
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    lengths = state.copy()
    lengths[..., first] = lengths[..., second] = np.hypot(state[..., first], state[..., second])
    return lengths


def round_cache(graph: ir.Graph, scales: Scales) -> None:
    """Hold the states of a lowered graph in int8, in place; inputs and outputs keep their names and shapes.

    Args:
        graph: whose layers all attend by GroupQueryAttention.
        scales: of `calibrate`.
    """
    lengths = _lengths(graph)
    for number, node in enumerate(list(_attentions(graph))):
        key, value = _states_of(node)
        _branch(graph, f"layer_{number}", _Layer(node, scales[key], scales[value]), *lengths)
    for state in (*graph.inputs, *graph.outputs):
        if state.name and state.name.startswith(("past_key_values.", "present.")):
            state.type = ir.TensorType(ir.DataType.INT8)


def _attentions(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "GroupQueryAttention"]


def _states_of(node: ir.Node) -> tuple[str, str]:
    key, value = node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE]
    assert key is not None
    assert value is not None
    return str(key.name), str(value.name)


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """(short, reach): whether the step is short; and how much of the buffers it can touch, padding included, (1,) int32.

    A row of `reach` positions has room for the padded step wherever the row begins.
    """
    first = graph[0]
    inputs = {value.name: value for value in graph.inputs}
    (tokens,) = insert(graph, first, "Shape", [inputs[contract.START_OFFSETS_KERNEL]], {"start": 1, "end": 2})
    bound = constant(graph, "shortest_long", ir.tensor([SHORTEST_LONG], dtype=ir.DataType.INT64))
    (short,) = insert(graph, first, "Less", [tokens, bound])
    (cached,) = insert(graph, first, "ReduceMax", [inputs[contract.SEQLEN_OFFSETS]])
    (new,) = insert(graph, first, "Cast", [tokens], {"to": int(ir.DataType.INT32)})
    (reach,) = insert(graph, first, "Add", [cached, new])
    short.name, reach.name = "step_is_short", "reach"
    return short, reach


def _branch(graph: ir.Graph, name: str, layer: _Layer, short: ir.Value, reach: ir.Value) -> None:
    """Replace a layer's attention by the choice between the two."""
    branches = {
        "then_branch": _short(graph, f"{name}.short", layer),
        "else_branch": _long(graph, f"{name}.long", layer, reach),
    }
    outputs = insert(graph, layer.node, "If", [short], {k: ir.AttrGraph(k, g) for k, g in branches.items()}, outputs=3)
    for old, new in zip(layer.node.outputs, outputs, strict=True):
        replace(old, new)
    graph.remove(layer.node, safe=True)


class _Branch:
    """A subgraph in the making: nodes, and names that no other graph has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Append a node; return its outputs."""
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
        node.name = f"{self.name}.{len(self.nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self.nodes.append(node)
        return node.outputs

    def close(self, attended: ir.Value, key: ir.Value, value: ir.Value) -> ir.Graph:
        """The subgraph."""
        for output, dtype in ((attended, ir.DataType.FLOAT), (key, ir.DataType.INT8), (value, ir.DataType.INT8)):
            output.type = ir.TensorType(dtype)
        return ir.Graph([], [attended, key, value], nodes=self.nodes, name=self.name)


def _short(graph: ir.Graph, name: str, layer: _Layer) -> ir.Graph:
    """The operator on codes."""
    branch, inputs = _Branch(name), list(layer.node.inputs)
    inputs[_K_SCALE] = constant(graph, f"{name}.key_scales", ir.tensor(layer.key_scales))
    inputs[_V_SCALE] = constant(graph, f"{name}.value_scales", ir.tensor(layer.value_scales))
    attributes = dict(layer.node.attributes) | {
        "k_quant_type": "PER_CHANNEL",
        "v_quant_type": "PER_CHANNEL",
        "kv_cache_bit_width": 8,
    }
    outputs = branch.add("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)
    return branch.close(*outputs)


def _long(graph: ir.Graph, name: str, layer: _Layer, reach: ir.Value) -> ir.Graph:
    """The operator on floats that are the codes, over the first `reach` positions of the buffers."""
    branch, inputs = _Branch(name), list(layer.node.inputs)

    def scaled(value: ir.Value | None, part: str, factors: NDArray[np.float32]) -> ir.Value:
        return branch.add("Mul", [value, constant(graph, f"{name}.{part}_factors", ir.tensor(factors))])[0]

    queries = layer.of_queries(layer.key_scales)
    keys, values = np.reciprocal(layer.key_scales), np.reciprocal(layer.value_scales)
    if inputs[_KEY] is None:
        inputs[0] = scaled(inputs[0], "packed", np.concatenate([queries, keys.ravel(), values.ravel()]))
    else:
        inputs[0] = scaled(inputs[0], "query", queries)
        inputs[_KEY] = scaled(inputs[_KEY], "key", keys.ravel())
        inputs[_VALUE] = scaled(inputs[_VALUE], "value", values.ravel())
    start = constant(graph, "from_first", ir.tensor([0], dtype=ir.DataType.INT32))
    axis = constant(graph, "positions_axis", ir.tensor([2], dtype=ir.DataType.INT32))
    caches = inputs[_PAST_KEY], inputs[_PAST_VALUE]
    for place, cache in zip((_PAST_KEY, _PAST_VALUE), caches, strict=True):
        (part,) = branch.add("Slice", [cache, start, reach, axis])
        (inputs[place],) = branch.add("Cast", [part], {"to": int(ir.DataType.FLOAT)})
    attended, *presents = branch.add(
        "GroupQueryAttention", inputs, dict(layer.node.attributes), domain=MICROSOFT, outputs=3
    )
    one = constant(graph, "scale_1", ir.tensor(np.float32(1)))
    zero = constant(graph, "zero_i8", ir.tensor(np.int8(0)))
    written: list[ir.Value] = []
    for cache, present in zip(caches, presents, strict=True):
        (codes,) = branch.add("QuantizeLinear", [present, one, zero])
        written += branch.add("TensorScatter", [cache, codes], {"axis": 2})  # from the first position on
    attended = scaled(attended, "output", layer.of_queries(layer.value_scales))
    return branch.close(attended, *written)
