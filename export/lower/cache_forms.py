"""How a KV cache is rounded to 8 bits: `state = code * scale + offset`, chosen from what an exact model has cached.

A scale a layer, head and channel. The two channels of a key that RoPE rotates into one another share the largest length
of that pair, which no position changes. Values have offsets as well: what a row's first token has. Heads that have
nothing to say attend to it, so it counts more than all others, and it is nearly the same in every row; with the offset
its codes are 0 and stand for it exactly. (Keys cannot have any: the operator rotates them.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ... import BuildError
from ..functions import DOMAIN
from .rewrite import extent, producer

KEY, PAST_KEY, PAST_VALUE, COS, SINKS = 1, 3, 4, 7, 11
"""Inputs of GroupQueryAttention."""
LIMIT = 127
"""Largest magnitude of a code."""
_HEADROOM = {"key": 1.1, "value": 1.35}
"""Scales are this much wider than what calibration saw: rounding is coarser by it, and clipping hurts more. Values have
longer tails than the lengths of keys' pairs (measured: the largest of 1,500 tokens is up to 3 times that of 250).
"""
_NARROWEST = 1 / 32
"""Of a head's widest scale: a channel that was silent on the few tokens of a calibration may speak on others."""


@dataclass(frozen=True, slots=True)
class CacheForm:
    """How one layer's states are rounded. Each (Hkv, D) float32."""

    key_scales: NDArray[np.float32]
    value_scales: NDArray[np.float32]
    value_offsets: NDArray[np.float32]

    def tensors(self, key: str) -> dict[str, NDArray[np.float32]]:
        """What the bundle's file holds of a layer, `NAME.scales` and, of values, `NAME.offsets` a state.

        key: name of the input that holds the keys.
        """
        value = key.removesuffix("key") + "value"
        return {
            f"{key}.scales": self.key_scales,
            f"{value}.scales": self.value_scales,
            f"{value}.offsets": self.value_offsets,
        }


def calibrate(graph: ir.Graph, states: Sequence[Sequence[NDArray[np.floating]]]) -> dict[str, CacheForm]:
    """The form of each layer's cache, from what an exact model has cached.

    A value's scale is its channel's largest magnitude over 127, the offset aside. The two channels of a key that RoPE
    rotates into one another share the largest length of that pair, which no position changes.

    Args:
        graph: lowered, with float states.
        states: of each row the state tensors (Hkv, length, D), in the contract's order; each row begins a text.

    Returns:
        Name of the input of the layer's keys -> form.

    Raises:
        BuildError: a layer's attention is not the fused operator, which alone can hold codes.
    """
    names = [str(value.name) for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    nodes = {states_of(node)[0]: node for node in attentions(graph)}
    forms = {}
    for index, name in enumerate(names[::2]):
        node = nodes.get(name)
        if node is None:
            raise BuildError(f"--kv int8 is for layers that run as GroupQueryAttention; that of {name} does not fit it")
        keys, values = ([np.asarray(row[2 * index + kind]) for row in states] for kind in (0, 1))
        offsets = np.median([value[:, 0] for value in values], axis=0).astype(np.float32)
        if node.inputs[SINKS] is not None:  # then probabilities do not sum to one
            offsets = np.zeros_like(offsets)
        forms[name] = CacheForm(
            _scales([_rotated_lengths(node, key) for key in keys], _HEADROOM["key"]),
            _scales([value - offsets[:, None] for value in values], _HEADROOM["value"]),
            offsets,
        )
    return forms


def _scales(rows: Sequence[NDArray[np.floating]], headroom: float) -> NDArray[np.float32]:
    """Rows (Hkv, length, D) -> (Hkv, D)."""
    peaks = np.max([np.abs(row).max(1) for row in rows], axis=0)
    floor = np.maximum(peaks.max(1, keepdims=True) * _NARROWEST, np.finfo(np.float32).tiny * LIMIT)
    return (np.maximum(peaks, floor) * (headroom / LIMIT)).astype(np.float32)


def _rotated_lengths(node: ir.Node, keys: NDArray[np.floating]) -> NDArray[np.floating]:
    """The keys (Hkv, length, D); where RoPE rotates a pair of channels, the length of the pair in both."""
    rotated = _rotation(node)
    if rotated is None:
        return keys
    half, interleaved = rotated
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    lengths = keys.copy()
    lengths[..., first] = lengths[..., second] = np.hypot(keys[..., first], keys[..., second])
    return lengths


def _rotation(node: ir.Node) -> tuple[int, bool] | None:
    """How many pairs of a key are rotated, by the operator or before it, and whether they are neighbours."""
    if node.attributes["do_rotary"].as_int():
        return extent(node.inputs[COS], 1), bool(node.attributes["rotary_interleaved"].as_int())
    rope = producer(node.inputs[KEY], "RoPE", DOMAIN)
    if rope is None:
        return None
    return extent(rope.inputs[2], 1), bool(rope.attributes["interleaved"].as_int())


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """The fused operators, layer by layer."""
    return [node for node in graph if node.op_type == "GroupQueryAttention"]


def states_of(node: ir.Node) -> tuple[str, str]:
    """Names of the inputs that hold a layer's keys and values."""
    key, value = node.inputs[PAST_KEY], node.inputs[PAST_VALUE]
    assert key is not None
    assert value is not None
    return str(key.name), str(value.name)
