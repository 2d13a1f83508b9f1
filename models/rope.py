"""RoPE tables: cosines and sines of every position, with each of the known scalings.

The arithmetic follows transformers' `modeling_rope_utils` in float32 step by step, because that is what
checkpoints are used with; tables agree to float32 rounding. Scalings that transformers switches with the length
(longrope, dynamic NTK) have one regime in a compiled engine, chosen by the number of positions it is built for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .config import ConfigReader


@dataclass(frozen=True, slots=True)
class RopeTables:
    """cos, sin: (P, R/2) float32, one row a position; they already hold the attention factor of YaRN and longrope."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: base of the frequencies. rotary_dim: R, even, how many of a head's dimensions turn.

    max_position_embeddings: the length the model was configured for; original_max_position_embeddings: the one it was
    trained for before scaling. scaling: the scaling's own keys. longest: the tokens a row can hold, by which the regime
    is chosen; 0 stands for as many as the tables have rows.
    """

    kind: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    scaling: ConfigReader
    longest: int = 0

    def tables(self, positions: int) -> RopeTables:
        """Return the tables for positions 0 … positions - 1, on the CPU.

        Raises:
            ConfigError: the scaling lacks a key or holds an impossible value.
        """
        inverse, factor = SCALINGS[self.kind](self, self.longest or positions)
        steps = torch.arange(positions, dtype=torch.float32, device="cpu")
        angles = steps[:, None] * inverse[None, :]
        return RopeTables(angles.cos() * factor, angles.sin() * factor)


def read_rope(
    config: ConfigReader,
    head_dim: int,
    *,
    scaling: ConfigReader | None = None,
    theta: float = 10_000.0,
    partial_rotary_factor: float = 1.0,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Read RoPE from a config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Args:
        config: the whole configuration.
        head_dim: of a head of q and k.
        scaling: the one object to read, for a model with several RoPEs.
        theta, partial_rotary_factor: the family's, where the configuration has none.
        aliases: the family's other names of scalings.

    Raises:
        ConfigError: an unknown scaling, or a rotary dimension that is odd or larger than the head.
    """
    limit = config.integer("max_position_embeddings", 2048)
    if scaling is None:
        scaling = config.section("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
        places = (scaling, config)
        original_places = (config, scaling)
    else:
        places = original_places = (scaling, scaling)
    type_key = "rope_type" if scaling.has("rope_type") else "type"
    aliases = aliases or {}
    kind = scaling.choice(type_key, {*SCALINGS, *aliases}, "default")
    rotary_dim = int(
        head_dim * _first(places, "partial_rotary_factor").number("partial_rotary_factor", partial_rotary_factor)
    )
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.error(f"RoPE turns pairs: {rotary_dim} of {head_dim} dimensions cannot be turned")
    key = "original_max_position_embeddings"
    rope = RopeConfig(
        aliases.get(kind, kind),
        _first(places, "rope_theta").number("rope_theta", theta),
        rotary_dim,
        limit,
        _first(original_places, key).integer(key, limit),
        scaling,
    )
    rope.tables(1)
    return rope


def settle_regime(config: Any, capacity: int) -> Any:
    """The configuration (a family's dataclass) with the regime of its RoPEs chosen for rows of `capacity` tokens.

    Tables have more rows than that, for the padding of a chunk, and padding must not choose the regime.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    ropes = {name: replace(v, longest=capacity) for name, v in values.items() if isinstance(v, RopeConfig)}
    return replace(config, **ropes)


def _first(places: tuple[ConfigReader, ConfigReader], key: str) -> ConfigReader:
    """The first of two objects if it has the key, else the second."""
    return places[0] if places[0].has(key) else places[1]


def _frequencies(theta: float, rotary_dim: int) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    return theta**exponents


def _default(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:  # noqa: ARG001
    return 1.0 / _frequencies(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:
    inverse, factor = _default(rope, positions)
    return inverse / rope.scaling.number("factor"), factor


def _dynamic(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:
    """NTK-aware scaling; the base grows with the length the engine is built for."""
    factor, limit, dim = rope.scaling.number("factor"), rope.max_position_embeddings, rope.rotary_dim
    length = max(positions, limit)
    theta = rope.theta * ((factor * length / limit) - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / _frequencies(theta, dim), 1.0


def _llama3(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    read = rope.scaling
    factor = read.number("factor")
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    original = rope.original_max_position_embeddings
    if high <= low:
        raise read.error("high_freq_factor must be greater than low_freq_factor")
    inverse, _ = _default(rope, positions)
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    inverse = torch.where(
        wavelength > original / low, inverse / factor, torch.where(wavelength < original / high, inverse, blended)
    )
    return inverse, 1.0


def _yarn(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:  # noqa: ARG001
    """YaRN (Peng et al. 2023, arXiv:2309.00071), sections 3.2 to 3.4."""
    read, dim = rope.scaling, rope.rotary_dim
    original = rope.original_max_position_embeddings
    factor = read.number("factor", rope.max_position_embeddings / original)

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(read.number("beta_fast", 32.0)), correction(read.number("beta_slow", 1.0))
    if read.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = _frequencies(rope.theta, dim)
    inverse = 1.0 / (factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if read.has("mscale") and read.has("mscale_all_dim"):
        attention = mscale(read.number("mscale")) / mscale(read.number("mscale_all_dim"))
    else:
        attention = mscale(1.0)
    return inverse, read.number("attention_factor", attention)


def _longrope(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): the long factors when built for more than the original length."""
    read = rope.scaling
    original = rope.original_max_position_embeddings
    factor = read.number("factor", rope.max_position_embeddings / original)
    regime = "long_factor" if positions > original else "short_factor"
    stretch = torch.tensor(read.numbers(regime, rope.rotary_dim // 2), dtype=torch.float32, device="cpu")
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (stretch * _frequencies(rope.theta, rope.rotary_dim)), read.number("attention_factor", attention)


def _factors(rope: RopeConfig, positions: int) -> tuple[Tensor, float]:
    """A divisor a frequency, as llama.cpp stores the llama3 scaling in a GGUF (`rope_freqs.weight`)."""
    inverse, _ = _default(rope, positions)
    return inverse / torch.tensor(rope.scaling.numbers("factors", rope.rotary_dim // 2), device="cpu"), 1.0


SCALINGS: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
