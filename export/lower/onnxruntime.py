"""Lowering for ONNX Runtime on the CPU: markers become its fused operators.

RoPE + KvCacheUpdate + CachedAttention become one GroupQueryAttention, residual add + RmsNorm one
SkipSimplifiedLayerNormalization, linears multiply by the checkpoint's own (N, K) rows, and the q, k and v of a layer
are one multiplication. What does not fit a fused operator keeps its marker, and with it its body.

For the quality class `fast` there is a second graph for long steps, whose linears multiply in 8 bits: see `int8`. The
KV cache can be held in 8 bits: see `int8_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime import contract
from ..functions import DOMAIN
from .cache_forms import calibrate
from .gather_early import gather_early
from .int8 import Derived, round_linears
from .int8_cache import round_cache
from .join_linears import join_projections, join_siblings
from .quantized import Corrections, fuse_quantized
from .rewrite import MICROSOFT, clean, constant, drop_unused, extent, insert, producer, replace

# What GroupQueryAttention asks of head_dim, and more, also of the width of RoPE's tables, if it is to rotate.
_HEAD_DIM_MULTIPLE = 8
_ROTARY_HEAD_DIM_MULTIPLE = 16
_ROTARY_TABLE_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Lowered:
    """model: the graph. packs: new initialiser -> the universal's initialisers whose rows it joins.

    corrections: modules whose weights have wider rows than the universal graph's; see `quantized`.
    prefill: a graph of its own for long steps, or None. derived: initialisers that only it has; see `int8`.
    cache_forms: how the states are rounded, the tensors of the bundle's file; none if they are floats.
    """

    model: ir.Model
    packs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    corrections: Corrections = field(default_factory=dict)
    prefill: ir.Model | None = None
    derived: Derived = field(default_factory=dict)
    cache_forms: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def lower(universal: ir.Model, quality: str = "exact") -> Lowered:
    """Return the lowered copy of `universal`; weights without data stay without.

    Args:
        universal: the graph.
        quality: `exact` leaves block-quantised weights to their bodies; any other computes with them. `fast` has a
            graph for prefill too, if any weights are quantised.
    """
    model = universal.clone()
    model.opset_imports[MICROSOFT] = 1
    packs: dict[str, tuple[str, ...]] = {}
    _fuse_layers(model.graph, packs)
    drop_unused(model)
    join_siblings(model.graph, packs)
    drop_unused(model)
    gather_early(model.graph)
    fuse_norms(model.graph)
    fuse_experts(model.graph)
    corrections = {} if quality == "exact" else fuse_quantized(model.graph, packs)
    clean(model)
    lowered = Lowered(model, _used(packs, model.graph), corrections)
    return _with_prefill(lowered, universal) if quality == "fast" else lowered


def with_int8_cache(lowered: Lowered, states: Sequence[Sequence[NDArray[np.floating]]]) -> Lowered:
    """The same, its graphs changed in place to hold the KV cache in int8.

    Args:
        lowered: with float states.
        states: for calibration: of each row of some prompts the state tensors (Hkv, length, D).

    Raises:
        BuildError: a layer's attention cannot.
    """
    forms = calibrate(lowered.model.graph, states)
    for model in (lowered.model, lowered.prefill):
        if model is not None:
            round_cache(model.graph, forms)
            clean(model)
    tensors = {name: part for key, form in forms.items() for name, part in form.tensors(key).items()}
    return replace_fields(lowered, cache_forms=tensors)


def _with_prefill(lowered: Lowered, universal: ir.Model) -> Lowered:
    """With the graph for prefill, in which only the linears of the tokens that want logits are as in the other."""
    model = universal.clone()
    model.opset_imports[MICROSOFT] = 1
    packs: dict[str, tuple[str, ...]] = {}
    _fuse_layers(model.graph, packs)
    drop_unused(model)
    gather_early(model.graph)
    derived = round_linears(model.graph, packs)
    if not derived:
        return lowered
    drop_unused(model)
    join_siblings(model.graph, packs)  # the rest: gate and up of the last layer
    drop_unused(model)
    fuse_norms(model.graph, with_skip=False)
    fuse_experts(model.graph)
    fuse_quantized(model.graph, packs)
    clean(model)
    return replace_fields(lowered, packs=lowered.packs | _used(packs, model.graph), prefill=model, derived=derived)


def _fuse_layers(graph: ir.Graph, packs: dict[str, tuple[str, ...]]) -> None:
    """What every graph begins with."""
    fuse_silu(graph)
    fuse_linears(graph)
    fuse_attention(graph)
    join_projections(graph, packs)


def _used(packs: dict[str, tuple[str, ...]], graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    return {name: members for name, members in packs.items() if name in graph.initializers}


def fuse_silu(graph: ir.Graph) -> None:
    """x * Sigmoid(x) -> QuickGelu with alpha 1: one pass over the activations."""
    for node in list(graph):
        if node.op_type == "Mul" and node.domain == "":
            for x, gate in (node.inputs, reversed(node.inputs)):
                sigmoid = producer(gate, "Sigmoid")
                if sigmoid is not None and sigmoid.inputs[0] is x:
                    (silu,) = insert(graph, node, "QuickGelu", [x], {"alpha": 1.0}, domain=MICROSOFT)
                    replace(node.outputs[0], silu)
                    break


def fuse_linears(graph: ir.Graph) -> None:
    """MatMul(x, Transpose(W)) -> FusedMatMul(x, W, transB): W is read as it lies in the checkpoint."""
    for node in list(graph):
        if node.op_type == "MatMul" and node.domain == "":
            transpose = producer(node.inputs[1], "Transpose")
            if transpose is not None and transpose.inputs[0] in graph.initializers.values():
                inputs = [node.inputs[0], transpose.inputs[0]]
                (product,) = insert(graph, node, "FusedMatMul", inputs, {"transB": 1}, domain=MICROSOFT)
                replace(node.outputs[0], product)


def fuse_norms(graph: ir.Graph, *, with_skip: bool = True) -> None:
    """RmsNorm -> SimplifiedLayerNormalization, and with the residual add in front SkipSimplifiedLayerNormalization.

    The sum is an output of the fused node, so the residual stream is read and written once.

    Args:
        graph: the graph.
        with_skip: fuse the add as well. Over many tokens the two nodes are faster than the one: its loops, which add
            and sum up at once, are not vectorised.
    """
    for node in list(graph):
        if node.op_type not in ("RmsNorm", "QRmsNorm") or node.domain != DOMAIN:
            continue
        x, weight = node.inputs[0], _gain(graph, node)
        eps = node.attributes["eps"].as_float()
        add = producer(x, "Add")
        if with_skip and add is not None and _same_shape(*add.inputs) and _rank(add.inputs[0]) in (2, 3):
            normed, mean, inverse_std, total = insert(
                graph,
                node,
                "SkipSimplifiedLayerNormalization",
                [*add.inputs, weight],
                {"epsilon": eps},
                domain=MICROSOFT,
                outputs=4,
            )
            mean.name = inverse_std.name = ""  # not asked for, so not computed
            replace(add.outputs[0], total)
        else:
            attributes = {"epsilon": eps, "axis": -1, "stash_type": 1}
            (normed,) = insert(graph, node, "SimplifiedLayerNormalization", [x, weight], attributes)
        replace(node.outputs[0], normed)


def _gain(graph: ir.Graph, norm: ir.Node) -> ir.Value | None:
    """The gain (H,) of an RmsNorm; that of a QRmsNorm is dequantised in the graph, some hundred numbers a step."""
    if norm.op_type == "RmsNorm":
        return norm.inputs[1]
    x, codes, scales = norm.inputs
    (gain,) = insert(graph, norm, "DequantizeLinear", [codes, scales], {"axis": 0})
    if x is not None and scales is not None and x.dtype is not None and x.dtype != scales.dtype:
        (gain,) = insert(graph, norm, "Cast", [gain], {"to": int(x.dtype)})
    flat = constant(graph, "flat", ir.tensor([-1], dtype=ir.DataType.INT64))
    return insert(graph, norm, "Reshape", [gain, flat])[0]


def fuse_experts(graph: ir.Graph) -> None:
    """MoE -> ONNX Runtime's MoE, which runs each expert once, over the tokens that chose it."""
    for node in list(graph):
        if node.op_type != "MoE" or node.domain != DOMAIN:
            continue
        x, router_logits, gate_up, down, *biases = node.inputs
        up_bias, down_bias = biases or (None, None)
        num_experts = extent(gate_up, 0)
        shape = constant(graph, f"scores_of_{num_experts}", ir.tensor([-1, num_experts], dtype=ir.DataType.INT64))
        (scores,) = insert(graph, node, "Reshape", [router_logits, shape])
        attributes = {
            "k": node.attributes["top_k"].as_int(),
            "normalize_routing_weights": node.attributes["normalize"].as_int(),
            "activation_type": "swiglu",
            "swiglu_fusion": 1,  # rows of gate and up in turn
            "activation_alpha": node.attributes["alpha"].as_float(),
            "activation_beta": node.attributes["beta"].as_float(),
        }
        limit = node.attributes["limit"].as_float()
        if limit:
            attributes["swiglu_limit"] = limit
        inputs = [x, scores, gate_up, up_bias, down, down_bias]
        (mixed,) = insert(graph, node, "MoE", inputs, attributes, domain=MICROSOFT)
        replace(node.outputs[0], mixed)


def fuse_attention(graph: ir.Graph) -> None:
    """RoPE + KvCacheUpdate ×2 + CachedAttention -> GroupQueryAttention on ragged rows."""
    lengths: tuple[ir.Value, ir.Value] | None = None
    for node in list(graph):
        if node.op_type != "CachedAttention" or node.domain != DOMAIN:
            continue
        write_key, write_value = (producer(v, "KvCacheUpdate", DOMAIN) for v in node.inputs[1:3])
        if write_key is None or write_value is None or not _fits(write_key, write_value):
            continue
        if lengths is None:
            lengths = _lengths(graph)
        past_key, key, _ = write_key.inputs
        assert past_key is not None
        past_value, value, _ = write_value.inputs
        query = node.inputs[0]
        rope = producer(query, "RoPE", DOMAIN)
        rotated = rope is not None and key is rope.outputs[1] and _rotates(past_key, rope.inputs[2])
        cos = sin = None
        if rope is not None and rotated:
            query, key, cos, sin = rope.inputs[:4]
        sinks = node.inputs[4] if len(node.inputs) > 4 else None
        window = node.attributes["window"].as_int()
        attributes = {
            "num_heads": node.attributes["num_heads"].as_int(),
            "kv_num_heads": extent(past_key, 1),
            "scale": node.attributes["scale"].as_float(),
            "softcap": node.attributes["softcap"].as_float(),
            "local_window_size": window or -1,
            "do_rotary": int(rotated),
            "rotary_interleaved": rope.attributes["interleaved"].as_int() if rope is not None and rotated else 0,
        }
        positions = node.inputs[3] if rotated else None
        absent: list[ir.Value | None] = [None, None, None, None]  # scales of a quantised cache, QK norm weights
        inputs = [query, key, value, past_key, past_value, *lengths, cos, sin, positions, None, sinks, *absent]
        attended, present_key, present_value = insert(
            graph,
            node,
            "GroupQueryAttention",
            [*inputs, _input(graph, contract.INPUT_LENS)],
            attributes,
            domain=MICROSOFT,
            outputs=3,
        )
        replace(node.outputs[0], attended)
        replace(write_key.outputs[0], present_key)
        replace(write_value.outputs[0], present_value)


def _fits(write_key: ir.Node, write_value: ir.Node) -> bool:
    """Whether GroupQueryAttention can hold this cache: one head_dim for keys and values, of a size it takes."""
    key, value = write_key.inputs[0], write_value.inputs[0]
    return _same_shape(key, value) and extent(key, 3) % _HEAD_DIM_MULTIPLE == 0


def _same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and b is not None and a.shape is not None and a.shape == b.shape


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def _rotates(past_key: ir.Value, cos: ir.Value | None) -> bool:
    """Whether GroupQueryAttention can rotate heads of this size by tables of this width (P, R/2) itself."""
    return extent(past_key, 3) % _ROTARY_HEAD_DIM_MULTIPLE == 0 and extent(cos, 1) % _ROTARY_TABLE_MULTIPLE == 0


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """(seqlens_k, total_sequence_length): valid length - 1 of each row, never negative; and the longest.

    The second is an upper bound by which the operator sizes its scratch memory, padding of new tokens included; the
    capacity would do, at a price.
    """
    first = graph[0]
    offsets, lens = _input(graph, contract.SEQLEN_OFFSETS), _input(graph, contract.INPUT_LENS)
    one = constant(graph, "one_i32", ir.tensor([1], dtype=ir.DataType.INT32))
    zero = constant(graph, "zero_i32", ir.tensor([0], dtype=ir.DataType.INT32))
    (total,) = insert(graph, first, "Add", [offsets, lens])
    (last,) = insert(graph, first, "Sub", [total, one])
    (seqlens_k,) = insert(graph, first, "Max", [last, zero])
    (longest,) = insert(graph, first, "ReduceMax", [total])
    (padded,) = insert(graph, first, "Shape", [_input(graph, contract.START_OFFSETS_KERNEL)], {"start": 1, "end": 2})
    (padded,) = insert(graph, first, "Cast", [padded], {"to": int(ir.DataType.INT32)})
    (longest,) = insert(graph, first, "Max", [longest, padded])
    return seqlens_k, longest


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)
