"""GGUF metadata as an HF config.json: what every decoder has, and what a family adds in its `GgufLayout`.

A key of the architecture's own that nothing here reads may change the mathematics, so it is refused, not ignored.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import GgufFacts, GgufLayout
from .gguf_keys import ArchitectureKeys
from .gguf_reader import GgufFile
from .gguf_rope import read_rope
from .gguf_vocabulary import token_id

_EMBEDDING = "token_embd.weight"
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "attention.causal")


def read_config(
    path: Path, file: GgufFile, layout: GgufLayout, class_name: str, rope_factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Translate the metadata.

    Args:
        path: for messages.
        file: the header.
        layout: of the file's architecture.
        class_name: the HF class, for `architectures`.
        rope_factors: the tensors `ROPE_FACTORS` that the file has.

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
        layout.epsilon[1]: keys.number(layout.epsilon[0]),
        "max_position_embeddings": keys.integer("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    config |= read_rope(keys, layout, head_dim, rope_factors)
    if keys.get("attention.sliding_window"):
        config["sliding_window"] = keys.integer("attention.sliding_window")
    for name in ("bos", "eos"):
        number = token_id(path, file.metadata, name)
        if number is not None:
            config[f"{name}_token_id"] = number
    if layout.config is not None:
        config |= layout.config(GgufFacts(keys, file.tensors.keys(), config))
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
