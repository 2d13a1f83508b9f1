"""RoPE of a GGUF, metadata and tensors, as the entries of an HF config.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..architecture import GgufLayout
from .gguf_keys import ArchitectureKeys

_LLAMA3, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

ROPE_FACTORS = (_LLAMA3, _LONG, _SHORT)
"""Tensors that belong to the configuration: divisors of the RoPE frequencies.

The first is llama.cpp's form of the scaling llama3, the others are those of longrope.
"""


def read_rope(
    keys: ArchitectureKeys, layout: GgufLayout, head_dim: int, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Translate everything that says how q and k turn.

    Args:
        keys: of the architecture.
        layout: of the architecture.
        head_dim: of a head of q and k.
        factors: the tensors `ROPE_FACTORS` that the file has, each with one divisor a frequency.

    Raises:
        CheckpointError: a key is missing or impossible, or the file scales in two ways at once.
    """
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if layout.permuted:
            raise keys.error(f"rope.dimension_count {rotary_dim} differs from the head's {head_dim}: not supported")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    for name, values in factors.items():
        if len(values) != rotary_dim // 2 or not all(math.isfinite(value) and value > 0 for value in values):
            raise keys.error(f"{name} must hold {rotary_dim // 2} positive numbers")
    scaling = _scaling(keys, factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _scaling(keys: ArchitectureKeys, factors: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """An attention factor that YaRN does not imply stays unread, and so refused, because HF has another formula."""
    linear = keys.number("rope.scale_linear", 1.0)  # the key that `rope.scaling.*` replaced
    kind = keys.choice("rope.scaling.type", ("none", "linear", "yarn", "longrope"))
    if _LONG in factors or _SHORT in factors or kind == "longrope":
        if set(factors) != {_LONG, _SHORT} or kind not in ("none", "longrope") or linear != 1.0:
            raise keys.error(f"longrope needs {_LONG} and {_SHORT}, and no other scaling")
        return _longrope(keys, factors)
    if factors:
        if kind != "none" or linear != 1.0:
            raise keys.error(f"RoPE is scaled by metadata and by {_LLAMA3} at once, which is not supported")
        return {"rope_type": "factors", "factors": list(factors[_LLAMA3])}
    if linear != 1.0:
        return {"rope_type": "linear", "factor": linear}
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{beta}" in keys:
                scaling[beta] = keys.number(f"rope.scaling.yarn_{beta}")
    return scaling


def _longrope(keys: ArchitectureKeys, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        "long_factor": list(factors[_LONG]),
        "short_factor": list(factors[_SHORT]),
    }
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor")
    return scaling
