"""GGUF metadata as an HF config.json: what every decoder has, and what a family adds in its `GgufLayout`.

A key of the architecture's own that nothing here reads may change the mathematics, so it is refused, not ignored.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import CheckpointError
from ..architecture import GgufLayout
from .gguf_reader import GgufFile
from .gguf_tokenizer import token_id

_EMBEDDING = "token_embd.weight"
_MAX_SIZE = 1 << 24  # vocabularies reach 2^18, contexts 10 million
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "attention.causal")


class ArchitectureKeys(Mapping[str, Any]):
    """The metadata under `{architecture}.`, without that prefix, with typed reads; it remembers what was asked for."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], name: str) -> None:
        self.path = path
        self._name = name
        prefix = f"{name}."
        self._values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer in 1 … 2^24."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            raise self._wrong(key, f"an integer in 1 … {_MAX_SIZE:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self._wrong(key, "a positive number")
        return float(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of `allowed`, the first if the key is absent."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}")
        return str(value)

    def error(self, message: str) -> CheckpointError:
        """The error to raise for what only the caller can judge."""
        return CheckpointError(f"{self.path}: {message}")

    def refuse_unread(self) -> None:
        """Raise if a key that nobody asked for is set to anything but zero, false or nothing."""
        if unread := [key for key, value in self._values.items() if key not in self._asked and value]:
            listed = ", ".join(f"{self._name}.{key}" for key in unread[:8])
            raise self.error(f"metadata that this version does not know, and that may change the mathematics: {listed}")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"the metadata key '{self._name}.{key}' is missing")
        return value

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        found = repr(self._values[key])
        shown = found if len(found) <= 80 else f"{found[:80]}…"
        return self.error(f"the metadata key '{self._name}.{key}' must be {wanted}, found {shown}")


def read_config(
    path: Path, file: GgufFile, layout: GgufLayout, class_name: str, rope_factors: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    """Translate the metadata.

    Args:
        path: for messages.
        file: the header.
        layout: of the file's architecture.
        class_name: the HF class, for `architectures`.
        rope_factors: (head_dim / 2,) float32, a divisor of each RoPE frequency, where the file has them.

    Raises:
        CheckpointError: a key is missing, impossible or not known, or metadata and tensors contradict each other.
    """
    keys = ArchitectureKeys(path, file.metadata, layout.name)
    hidden_size, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if "attention.key_length" not in keys and hidden_size % heads:
        raise keys.error(f"embedding_length {hidden_size} is not a multiple of attention.head_count {heads}")
    head_dim = keys.integer("attention.key_length", hidden_size // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.error("attention.value_length differs from attention.key_length, which is not supported")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "vocab_size": _vocab_size(keys, file),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": _layers(keys, file),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    config |= _rope(keys, layout, head_dim, rope_factors)
    if keys.get("attention.sliding_window"):
        config["sliding_window"] = keys.integer("attention.sliding_window")
    for name in ("bos", "eos"):
        number = token_id(path, file.metadata, name)
        if number is not None:
            config[f"{name}_token_id"] = number
    if layout.config is not None:
        config |= layout.config(keys)
    for key in _HARMLESS:
        keys.get(key)
    keys.refuse_unread()
    return config


def _vocab_size(keys: ArchitectureKeys, file: GgufFile) -> int:
    """Rows of the embedding; the token list may be shorter (padding), never longer."""
    if _EMBEDDING not in file.tensors:
        raise keys.error(f"it has no tensor {_EMBEDDING}, so it is no whole language model")
    rows = file.tensors[_EMBEDDING].shape[0]
    if keys.integer("vocab_size", rows) != rows:
        raise keys.error(f"vocab_size is {keys['vocab_size']:,}, but {_EMBEDDING} has {rows:,} rows")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise keys.error(f"it has {len(tokens):,} tokens, but {_EMBEDDING} only {rows:,} rows")
    return rows


def _layers(keys: ArchitectureKeys, file: GgufFile) -> int:
    """The number of layers; the tensors must be of just so many, or a lie would build millions of modules."""
    count = keys.integer("block_count")
    found = {match[1] for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if len(found) != count:
        raise keys.error(f"block_count is {count:,}, but there are tensors of {len(found):,} layers")
    return count


def _rope(
    keys: ArchitectureKeys, layout: GgufLayout, head_dim: int, factors: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if layout.permuted:
            raise keys.error(f"rope.dimension_count {rotary_dim} differs from the head's {head_dim}: not supported")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _rope_scaling(keys)
    if factors is not None:
        if scaling is not None:
            raise keys.error("RoPE is scaled by metadata and by rope_freqs.weight at once, which is not supported")
        if len(factors) != rotary_dim // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
            raise keys.error(f"rope_freqs.weight must hold {rotary_dim // 2} positive numbers")
        scaling = {"rope_type": "factors", "factors": factors.tolist()}
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(keys: ArchitectureKeys) -> dict[str, Any] | None:
    """`rope.scaling.*`; an attention factor of its own stays unread, and so refused, because HF has another formula."""
    linear = keys.number("rope.scale_linear", 1.0)  # the key that `rope.scaling.*` replaced
    if linear != 1.0:
        return {"rope_type": "linear", "factor": linear}
    kind = keys.choice("rope.scaling.type", ("none", "linear", "yarn"))
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{beta}" in keys:
                scaling[beta] = keys.number(f"rope.scaling.yarn_{beta}")
    return scaling
