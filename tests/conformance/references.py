"""What each marker means, in float64 numpy, written from its formula and not from `models/ops`.

A result carries its `magnitude`: the formula with every term replaced by its absolute value, hence the size of the
numbers that were added up to make it. Rounding errors are proportional to that, not to the (perhaps cancelled) result,
so tolerances are multiples of eps × magnitude. A magnitude of 0 says that the result is copied and must be exact.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = Mapping[str, Any]
Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """value and magnitude: float64, of one shape. compared: where the marker defines the result; None is everywhere."""

    value: np.ndarray
    magnitude: np.ndarray
    compared: np.ndarray | None = None


Reference = dict[str, Expected]


def rms_norm(inputs: Inputs, attributes: Attributes) -> Reference:
    """y = x / sqrt(mean(x²) + eps) · weight. Nothing cancels: the magnitude is |y|."""
    return {"y": _normalised(inputs["x"], inputs["weight"], attributes["eps"])}


def add_rms_norm(inputs: Inputs, attributes: Attributes) -> Reference:
    """sum = x + residual, one rounding relative to itself; y = RmsNorm(sum)."""
    total = inputs["x"] + inputs["residual"]
    return {
        "sum": Expected(total, np.abs(total)),
        "y": _normalised(total, inputs["weight"], attributes["eps"]),
    }


def q_rms_norm(inputs: Inputs, attributes: Attributes) -> Reference:
    """RmsNorm; gain[b · block + j] = codes[b, j] · scales[b]."""
    gain = [
        float(code) * float(scale) for row, scale in zip(inputs["codes"], inputs["scales"], strict=True) for code in row
    ]
    return {"y": _normalised(inputs["x"], np.array(gain), attributes["eps"])}


def _normalised(x: np.ndarray, gain: np.ndarray, eps: float) -> Expected:
    y = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index].tolist()
        rms = math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        y[index] = [v / rms * g for v, g in zip(row, gain.tolist(), strict=True)]
    return Expected(y, np.abs(y))


def rope(inputs: Inputs, attributes: Attributes) -> Reference:
    """Each pair of a head's first rotary dimensions is turned by its angle at the token's position; the rest stays."""
    results = {"q_out": _turned(inputs["q"], attributes["num_heads"], inputs, attributes)}
    if inputs["k"] is not None:
        results["k_out"] = _turned(inputs["k"], attributes["num_key_value_heads"], inputs, attributes)
    return results


def _turned(x: np.ndarray, num_heads: int, inputs: Inputs, attributes: Attributes) -> Expected:
    batch, length, width = x.shape
    heads = x.reshape(batch, length, num_heads, width // num_heads)
    value, magnitude = heads.copy(), np.zeros_like(heads)
    pairs = inputs["cos"].shape[1]
    for b, s in np.ndindex(batch, length):
        position = inputs["start_offsets_kernel"][b, s]
        for pair in range(pairs):
            i, j = (2 * pair, 2 * pair + 1) if attributes["interleaved"] else (pair, pair + pairs)
            cos, sin = inputs["cos"][position, pair], inputs["sin"][position, pair]
            a, b_ = heads[b, s, :, i], heads[b, s, :, j]
            value[b, s, :, i], magnitude[b, s, :, i] = a * cos - b_ * sin, np.abs(a * cos) + np.abs(b_ * sin)
            value[b, s, :, j], magnitude[b, s, :, j] = b_ * cos + a * sin, np.abs(b_ * cos) + np.abs(a * sin)
    return Expected(value.reshape(x.shape), magnitude.reshape(x.shape))


def kv_cache_update(inputs: Inputs, attributes: Attributes) -> Reference:
    """updated[b, :, offset + s] = new[b, s] for the valid tokens; older entries stay; what lies beyond is undefined."""
    return {"updated": _updated(inputs["cache"], inputs["new"], None, inputs)}


def _updated(cache: np.ndarray, new: np.ndarray, magnitudes: np.ndarray | None, inputs: Inputs) -> Expected:
    value, magnitude, compared = cache.copy(), np.zeros_like(cache), np.zeros(cache.shape, bool)
    heads = cache.shape[1]
    for b, (offset, length) in enumerate(zip(inputs["seqlen_offsets"], inputs["input_lens"], strict=True)):
        compared[b, :, : offset + length] = True
        for s in range(length):
            value[b, :, offset + s] = new[b, s].reshape(heads, -1)
            if magnitudes is not None:
                magnitude[b, :, offset + s] = magnitudes[b, s].reshape(heads, -1)
    return Expected(value, magnitude, compared)


def cached_attention(inputs: Inputs, attributes: Attributes) -> Reference:
    """attended = Σ_j p_j v_j, p the softmax of the visible keys' logits (and the sink's), j in (position - window, position].

    The magnitude is Σ_j p_j |v_j| (1 + Λ_j + Σ_i p_i Λ_i), with Λ_j = scale · Σ_d |q_d k_jd|: an error of u·Λ_j in
    logit j is a relative one of the same size in exp(logit j), and through the sum in every weight. (tanh of the
    softcap has a slope of 1 at most, and a value below Λ_j.)
    """
    q, key, value = inputs["q"], inputs["key_cache"], inputs["value_cache"]
    arguments = (inputs["start_offsets_kernel"], inputs["sinks"], attributes)
    return {"attended": _attended(q, key, value, np.abs(q), np.abs(key), *arguments)}


def _attended(
    q: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    q_magnitude: np.ndarray,
    key_magnitude: np.ndarray,
    positions: np.ndarray,
    sinks: np.ndarray | None,
    attributes: Attributes,
) -> Expected:
    num_heads, scale = attributes["num_heads"], attributes["scale"]
    window, softcap = attributes["window"], attributes["softcap"]
    (batch, length, width), (kv_heads, capacity, value_dim) = q.shape, value.shape[1:]
    split = (batch, length, num_heads, width // num_heads)
    q, q_magnitude = q.reshape(split), q_magnitude.reshape(split)
    result = np.zeros((batch, length, num_heads, value_dim))
    magnitude = np.zeros_like(result)
    for b, s, h in np.ndindex(batch, length, num_heads):
        position = int(positions[b, s])
        oldest = max(0, position + 1 - window) if window else 0
        visible = slice(oldest, min(position + 1, capacity))
        kv_head = h * kv_heads // num_heads
        logits = key[b, kv_head, visible] @ q[b, s, h] * scale
        condition = key_magnitude[b, kv_head, visible] @ q_magnitude[b, s, h] * abs(scale)
        if softcap:
            logits = np.array([softcap * math.tanh(logit / softcap) for logit in logits])
        sink = [] if sinks is None else [float(sinks[h])]
        peak = max([*logits, *sink])
        weights = np.exp(logits - peak)
        sink_weight = math.exp(sink[0] - peak) if sink else 0.0
        total = math.fsum(weights) + sink_weight
        p = weights / total
        average = float(p @ condition) + (sink_weight / total * abs(sink[0]) if sink else 0.0)
        v = value[b, kv_head, visible]
        result[b, s, h] = p @ v
        magnitude[b, s, h] = (p * (1 + condition + average)) @ np.abs(v)
    flat = (batch, length, num_heads * value_dim)
    return Expected(result.reshape(flat), magnitude.reshape(flat))


def rope_kv_cache_attention(inputs: Inputs, attributes: Attributes) -> Reference:
    """RoPE, KvCacheUpdate of key and value, CachedAttention, in one; the magnitudes of RoPE go on into the logits."""
    turned = rope(inputs, attributes)
    q, k = turned["q_out"], turned["k_out"]
    present_key = _updated(inputs["past_key"], k.value, k.magnitude, inputs)
    present_value = _updated(inputs["past_value"], inputs["v"], None, inputs)
    # A rotation keeps lengths, but a component can be far smaller than what it is the difference of.
    key_magnitude = np.maximum(np.abs(present_key.value), present_key.magnitude)
    q_magnitude = np.maximum(np.abs(q.value), q.magnitude)
    attended = _attended(
        q.value,
        present_key.value,
        present_value.value,
        q_magnitude,
        key_magnitude,
        inputs["start_offsets_kernel"],
        inputs["sinks"],
        attributes,
    )
    steps = np.arange(q.value.shape[1])
    valid = np.broadcast_to((steps < inputs["input_lens"][:, None])[..., None], attended.value.shape)
    return {
        "attended": Expected(attended.value, attended.magnitude, valid),
        "present_key": present_key,
        "present_value": present_value,
    }


def q_linear(inputs: Inputs, attributes: Attributes) -> Reference:
    """y_n = Σ_k x_k w_nk with w of `_weights`; magnitude Σ |x| (|c s| + |o|)."""
    weight, bound = _weights(inputs, attributes)
    x = inputs["x"]
    return {"y": Expected(np.einsum("...k,nk->...n", x, weight), np.einsum("...k,nk->...n", np.abs(x), bound))}


def moe(inputs: Inputs, attributes: Attributes) -> Reference:
    """y = Σ_e p_e (D_e h_e + d_e), h = g σ(α g) (u + β), over the top_k experts; token by token, expert by expert.

    Magnitude: each sum of its terms' sizes; through h by its slopes in g and u; p by how far exp's argument is from 0.
    """
    x, scores = inputs["x"], inputs["router_logits"]
    alpha, beta, limit = (attributes[name] for name in ("alpha", "beta", "limit"))
    result, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    for index in np.ndindex(x.shape[:2]):
        token, logits = x[index], scores[index]
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: attributes["top_k"]]
        among = logits[chosen] if attributes["normalize"] else logits
        peak, total = max(among), math.fsum(np.exp(among - max(among)))
        for expert in chosen:
            both = inputs["gate_up"][expert] @ token
            size = np.abs(inputs["gate_up"][expert]) @ np.abs(token)
            if inputs["gate_up_bias"] is not None:
                both, size = both + inputs["gate_up_bias"][expert], size + np.abs(inputs["gate_up_bias"][expert])
            gate, up = both[0::2], both[1::2]
            if limit:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            sigmoid = 1 / (1 + np.exp(-alpha * gate))
            hidden = gate * sigmoid * (up + beta)
            slope = sigmoid * (1 + np.abs(alpha * gate) * (1 - sigmoid)) * np.abs(up + beta)
            hidden_size = np.abs(hidden) + slope * size[0::2] + np.abs(gate * sigmoid) * (size[1::2] + beta)
            out = inputs["down"][expert] @ hidden
            out_size = np.abs(inputs["down"][expert]) @ hidden_size
            if inputs["down_bias"] is not None:
                out, out_size = out + inputs["down_bias"][expert], out_size + np.abs(inputs["down_bias"][expert])
            p = math.exp(logits[expert] - peak) / total
            result[index] += p * out
            magnitude[index] += p * (out_size + (1 + peak - logits[expert]) * np.abs(out))
    return {"y": Expected(result, magnitude)}


def q_embedding(inputs: Inputs, attributes: Attributes) -> Reference:
    """y = rows of w; magnitude |c s| + |o|."""
    weight, bound = _weights(inputs, attributes)
    return {"y": Expected(weight[inputs["input_ids"]], bound[inputs["input_ids"]])}


def _weights(inputs: Inputs, attributes: Attributes) -> tuple[np.ndarray, np.ndarray]:
    """w_nk = (code_nk - 2^(bits - 1)) · scales_nb + offsets_nb, b = k // block_size, two 4-bit codes a byte; magnitude."""
    stored, scales, offsets = inputs["codes"], inputs["scales"], inputs["offsets"]
    bits, size = attributes["bits"], attributes["block_size"]
    weight = np.zeros((len(stored), scales.shape[1] * size))
    bound = np.zeros(weight.shape)
    for n, k in np.ndindex(weight.shape):
        code = int(stored[n, k * bits // 8]) >> (4 * (k % 2) if bits == 4 else 0) & (2**bits - 1)
        part = (code - 2 ** (bits - 1)) * scales[n, k // size]
        offset = 0.0 if offsets is None else offsets[n, k // size]
        weight[n, k], bound[n, k] = part + offset, abs(part) + abs(offset)
    return weight, bound
