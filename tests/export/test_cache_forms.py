"""Calibration of a KV cache in 8 bits: what the scales cover, and what is refused."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from zonda import BuildError
from zonda.export.functions import DOMAIN
from zonda.export.lower.cache_forms import LIMIT, calibrate
from zonda.export.lower.rewrite import MICROSOFT
from zonda.models import ops

HEADS, DIM, LENGTH = 2, 16, 40
STATES = ("past_key_values.0.key", "past_key_values.0.value")


def a_layer(*, rotates="operator", half=DIM // 2, interleaved=False, sinks=False, fused=True) -> ir.Graph:
    """One layer's attention in a graph. rotates: `operator`, `before` it, or not at all (`none`)."""

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    caches = [value(name, "batch", HEADS, "capacity", DIM) for name in STATES]
    given = query, key, new_value = [value(name, "batch", "sequence", HEADS * DIM) for name in ("q", "k", "v")]
    cos, sin, positions = value("cos", 99, half), value("sin", 99, half), value("positions", "batch", "sequence")
    nodes = []
    if rotates == "before":
        nodes = [
            ir.node(
                "RoPE",
                [query, key, cos, sin, positions],
                {"interleaved": int(interleaved)},
                domain=DOMAIN,
                num_outputs=2,
            )
        ]
        query, key = nodes[0].outputs
    inputs: list[ir.Value | None] = [None] * 17
    inputs[:5] = query, key, new_value, *caches
    if rotates == "operator":
        inputs[7:9] = cos, sin
    inputs[11] = value("sinks", HEADS) if sinks else None
    attributes = {
        "num_heads": HEADS,
        "do_rotary": int(rotates == "operator"),
        "rotary_interleaved": int(interleaved and rotates == "operator"),
    }
    op_type, domain = ("GroupQueryAttention", MICROSOFT) if fused else ("CachedAttention", DOMAIN)
    nodes.append(ir.node(op_type, inputs, attributes, domain=domain, num_outputs=3))
    return ir.Graph([*caches, *given], nodes[-1].outputs, nodes=nodes, name="layer")


def keys_and_values(seed: int = 0, rows: int = 3) -> list[list[np.ndarray]]:
    """Of each row (Hkv, length, D) keys and values, whose channels are of very different size."""
    draw = np.random.default_rng(seed)
    sizes = 3.0 ** draw.uniform(-1, 2, (HEADS, 1, DIM))
    return [
        [(draw.standard_normal((HEADS, LENGTH, DIM)) * sizes).astype(np.float32) for _ in "kv"] for _ in range(rows)
    ]


def clipped(states: np.ndarray, scales: np.ndarray) -> float:
    """The largest code that (Hkv, length, D) would take."""
    return float(np.abs(states / scales[:, None]).max())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotates", ["operator", "before"])
@pytest.mark.parametrize("half", [8, 4])
def test_no_position_makes_a_key_of_the_calibration_clip(rotates, half, interleaved):
    """The keys of one text turned by every angle that a pair can have."""
    states = keys_and_values()
    (form,) = calibrate(a_layer(rotates=rotates, half=half, interleaved=interleaved), states).values()
    for turn in range(60):
        angles = torch.full((99, half), 2 * np.pi * turn / 60)
        keys = torch.from_numpy(states[turn % 3][0].swapaxes(0, 1).reshape(1, LENGTH, HEADS * DIM).copy())
        positions = torch.arange(LENGTH)[None]
        turned, _ = ops.rope(keys, keys, angles.cos(), angles.sin(), positions, HEADS, HEADS, interleaved)
        turned = turned.numpy().reshape(LENGTH, HEADS, DIM).swapaxes(0, 1)
        assert clipped(turned, form.key_scales) < LIMIT
    pairs = np.arange(2 * half).reshape(-1, 2).T if interleaved else np.arange(2 * half).reshape(2, -1)
    np.testing.assert_array_equal(form.key_scales[:, pairs[0]], form.key_scales[:, pairs[1]])


def test_keys_that_nothing_rotates_have_a_scale_a_channel():
    states = keys_and_values()
    (form,) = calibrate(a_layer(rotates="none"), states).values()
    peaks = np.abs(np.concatenate([keys for keys, _ in states], 1)).max(1)
    np.testing.assert_allclose(form.key_scales, np.maximum(peaks, peaks.max(1, keepdims=True) / 32) * 1.1 / 127, 1e-6)


def test_what_a_row_begins_with_is_a_code_of_zero():
    """The first token's values are the same in every row but for one, and larger than all others."""
    states = keys_and_values(rows=5)
    first = np.random.default_rng(3).standard_normal((HEADS, DIM)).astype(np.float32) * 50
    for _, values in states[1:]:
        values[:, 0] = first
    (form,) = calibrate(a_layer(), states).values()
    np.testing.assert_array_equal(form.value_offsets, first)
    for _, values in states:
        assert clipped(values - form.value_offsets[:, None], form.value_scales) < LIMIT


def test_there_are_no_offsets_where_probabilities_do_not_sum_to_one():
    states = keys_and_values()
    (form,) = calibrate(a_layer(sinks=True), states).values()
    assert not form.value_offsets.any()
    for _, values in states:
        assert clipped(values, form.value_scales) < LIMIT


def test_a_channel_that_was_silent_has_a_part_of_its_heads_widest_scale():
    states = keys_and_values()
    for keys, values in states:
        keys[1, :, 3] = values[1, :, 3] = 0
    (form,) = calibrate(a_layer(rotates="none"), states).values()
    for scales in (form.key_scales, form.value_scales):
        np.testing.assert_allclose(scales[1, 3], scales[1].max() / 32, 1e-6)


def test_a_head_that_was_silent_can_be_divided_by():
    states = [[np.zeros((HEADS, LENGTH, DIM), np.float32)] * 2]
    (form,) = calibrate(a_layer(), states).values()
    for scales in (form.key_scales, form.value_scales):
        assert (scales > 0).all()
        assert np.isfinite(1 / scales).all()


def test_a_layer_that_is_not_fused_is_refused_by_name():
    with pytest.raises(BuildError, match=r"--kv int8 .* that of past_key_values\.0\.key does not fit"):
        calibrate(a_layer(fused=False), keys_and_values())


def test_the_file_names_every_part_by_the_input_of_its_state():
    (form,) = calibrate(a_layer(), keys_and_values()).values()
    tensors = form.tensors(STATES[0])
    assert tensors.keys() == {f"{STATES[0]}.scales", f"{STATES[1]}.scales", f"{STATES[1]}.offsets"}
    assert all(t.shape == (HEADS, DIM) and t.dtype == np.float32 for t in tensors.values())
