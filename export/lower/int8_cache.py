"""The graph of a KV cache in 8 bits; how it is rounded, `cache_forms` says.

Short steps leave codes to GroupQueryAttention, which multiplies by them as they are. Its loops go row by row, so over
many tokens they are slower than a product of matrices: a long step makes floats of the codes that are cached, attends
in float32 over them and what is new, and rounds the result back. There are two branches of an `If` a layer, in one
graph: the weights are held once, and choosing costs a few microseconds.

In the long branch scales never touch the cache. They go over to what is multiplied with it, before the operator
rotates:

    q · k = (q * scale) · (k / scale)        out = (p · (v / scale)) * scale

Offsets are taken off before attention and added after it, as its probabilities sum to one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime import contract
from .cache_forms import KEY, PAST_KEY, PAST_VALUE, CacheForm, attentions, states_of
from .rewrite import MICROSOFT, constant, insert, replace

SHORTEST_LONG = 8
"""Tokens a row from which on a step takes the branch that attends in float32: after 512 cached tokens the branch of
codes takes two thirds of its time at 4 tokens, twice its time at 16 (9 heads of 64, 3 of them cached).
"""
_K_SCALE, _V_SCALE = 12, 13


def round_cache(graph: ir.Graph, forms: Mapping[str, CacheForm]) -> None:
    """Hold the states of a lowered graph in int8, in place; inputs and outputs keep their names and shapes.

    Args:
        graph: whose layers all attend by GroupQueryAttention.
        forms: of `calibrate`.
    """
    short, reach = _lengths(graph)
    for number, node in enumerate(attentions(graph)):
        _Layer(graph, f"layer_{number}.cache", node, forms[states_of(node)[0]]).rewrite(short, reach)
    for state in (*graph.inputs, *graph.outputs):
        if state.name and state.name.startswith(("past_key_values.", "present.")):
            state.type = ir.TensorType(ir.DataType.INT8)


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """(short, reach): whether the step is short; and how much of the buffers it can touch, padding included.

    A row of `reach` positions, (1,) int32, has room for the padded step wherever the row begins. The operator holds an
    idle row for one that has cached a token, so there is room behind one at least.
    """
    first = graph[0]
    inputs = {value.name: value for value in graph.inputs}
    (tokens,) = insert(graph, first, "Shape", [inputs[contract.START_OFFSETS_KERNEL]], {"start": 1, "end": 2})
    bound = constant(graph, "shortest_long", ir.tensor([SHORTEST_LONG], dtype=ir.DataType.INT64))
    (short,) = insert(graph, first, "Less", [tokens, bound])
    (cached,) = insert(graph, first, "ReduceMax", [inputs[contract.SEQLEN_OFFSETS]])
    one = constant(graph, "one_i32", ir.tensor([1], dtype=ir.DataType.INT32))
    (cached,) = insert(graph, first, "Max", [cached, one])
    (new,) = insert(graph, first, "Cast", [tokens], {"to": int(ir.DataType.INT32)})
    (reach,) = insert(graph, first, "Add", [cached, new])
    short.name, reach.name = "step_is_short", "reach"
    return short, reach


class _Layer:
    """One layer's attention, on its way to codes."""

    def __init__(self, graph: ir.Graph, name: str, node: ir.Node, form: CacheForm) -> None:
        self._graph = graph
        self._name = name
        self._node = node
        self._form = form

    def rewrite(self, short: ir.Value, reach: ir.Value) -> None:
        """Replace the operator by the choice between two, and take offsets off before it and add them after."""
        node, offsets, inputs = self._node, self._form.value_offsets, list(self._node.inputs)
        add = functools.partial(insert, self._graph, node)
        if offsets.any():
            nothing = np.zeros_like(offsets)
            self._apply(add, "Add", inputs, "offsets_off", self._of_queries(nothing), nothing, -offsets)
        branches = {"then_branch": self._short(inputs), "else_branch": self._long(inputs, reach)}
        attributes = {name: ir.AttrGraph(name, branch) for name, branch in branches.items()}
        attended, *presents = add("If", [short], attributes, outputs=3)
        if offsets.any():
            (attended,) = add("Add", [attended, self._vector("offsets", self._of_queries(offsets))])
        for old, new in zip(node.outputs, (attended, *presents), strict=True):
            replace(old, new)
        self._graph.remove(node, safe=True)

    def _short(self, inputs: Sequence[ir.Value | None]) -> ir.Graph:
        """The operator on codes."""
        branch, inputs = _Branch(f"{self._name}.short"), list(inputs)
        inputs[_K_SCALE] = self._vector("key_scales", self._form.key_scales)
        inputs[_V_SCALE] = self._vector("value_scales", self._form.value_scales)
        kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return branch.close(*self._attend(branch, inputs, kinds))

    def _long(self, inputs: Sequence[ir.Value | None], reach: ir.Value) -> ir.Graph:
        """The operator on floats that are the codes, over the first `reach` positions of the buffers."""
        branch, inputs, form = _Branch(f"{self._name}.long"), list(inputs), self._form
        queries, keys, values = self._of_queries(form.key_scales), 1 / form.key_scales, 1 / form.value_scales
        self._apply(branch.add, "Mul", inputs, "factors", queries, keys, values)
        start = constant(self._graph, "first_position", ir.tensor([0], dtype=ir.DataType.INT32))
        axis = constant(self._graph, "positions_axis", ir.tensor([2], dtype=ir.DataType.INT32))
        caches = inputs[PAST_KEY], inputs[PAST_VALUE]
        for place, cache in zip((PAST_KEY, PAST_VALUE), caches, strict=True):
            (part,) = branch.add("Slice", [cache, start, reach, axis])
            (inputs[place],) = branch.add("Cast", [part], {"to": int(ir.DataType.FLOAT)})
        attended, *presents = self._attend(branch, inputs, {})
        one = constant(self._graph, "scale_1", ir.tensor(np.float32(1)))
        zero = constant(self._graph, "zero_i8", ir.tensor(np.int8(0)))
        written: list[ir.Value] = []
        for cache, present in zip(caches, presents, strict=True):
            (codes,) = branch.add("QuantizeLinear", [present, one, zero])
            written += branch.add("TensorScatter", [cache, codes], {"axis": 2})  # from the first position on
        (attended,) = branch.add("Mul", [attended, self._vector("output_scales", self._of_queries(form.value_scales))])
        return branch.close(attended, *written)

    def _attend(
        self, branch: "_Branch", inputs: Sequence[ir.Value | None], more: Mapping[str, object]
    ) -> Sequence[ir.Value]:
        attributes = {**self._node.attributes, **more}
        return branch.add("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)

    def _apply(
        self,
        add: Callable[..., Sequence[ir.Value]],
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        *parts: NDArray[np.floating],
    ) -> None:
        """Let an elementwise operator change queries, keys and values by a vector each; they may be packed in one."""
        vectors = [part.ravel() for part in parts]
        if inputs[KEY] is None:
            vectors = [np.concatenate(vectors)]
        for place, vector in enumerate(vectors):
            (inputs[place],) = add(op_type, [inputs[place], self._vector(f"{name}.{place}", vector)])

    def _of_queries(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each query head the numbers of the head that it reads: (Hkv, D) -> (Hq, D)."""
        return numbers.repeat(self._node.attributes["num_heads"].as_int() // len(numbers), axis=0)

    def _vector(self, name: str, numbers: NDArray[np.floating]) -> ir.Value:
        flat = numbers.astype(np.float32).ravel()
        return constant(self._graph, f"{self._name}.{name}", ir.tensor(flat))


class _Branch:
    """A subgraph in the making: nodes, and names that no other graph has."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[ir.Node] = []

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
        node.name = f"{self._name}.{len(self._nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self._nodes.append(node)
        return node.outputs

    def close(self, attended: ir.Value, key: ir.Value, value: ir.Value) -> ir.Graph:
        """The subgraph."""
        for output, dtype in ((attended, ir.DataType.FLOAT), (key, ir.DataType.INT8), (value, ir.DataType.INT8)):
            output.type = ir.TensorType(dtype)
        return ir.Graph([], [attended, key, value], nodes=self._nodes, name=self._name)
