"""Small checkpoints that a test can bend: GGUF and safetensors files as bytes, and a GGUF that is a whole model."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, LAYERS = 32, 4, 2, 1
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_end|>", "<tool>"]
TYPES = [3, 3, 3, 4]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def metadata() -> dict[str, Any]:
    """Of a model that opens; tests change entries, None removes one."""
    return {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.freq_base": np.float32(10_000),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [*TYPES, *[1] * (len(TOKENS) - len(TYPES))],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def weights(hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    """By HF name, in HF row order; the head is tied."""
    random = np.random.default_rng(0)
    kv, ffn, layer = hidden // HEADS * KV_HEADS, 2 * hidden, "model.layers.0"
    shapes = {
        "model.embed_tokens": (len(TOKENS), hidden),
        f"{layer}.input_layernorm": (hidden,),
        f"{layer}.self_attn.q_proj": (hidden, hidden),
        f"{layer}.self_attn.k_proj": (kv, hidden),
        f"{layer}.self_attn.v_proj": (kv, hidden),
        f"{layer}.self_attn.o_proj": (hidden, hidden),
        f"{layer}.post_attention_layernorm": (hidden,),
        f"{layer}.mlp.gate_proj": (ffn, hidden),
        f"{layer}.mlp.up_proj": (ffn, hidden),
        f"{layer}.mlp.down_proj": (hidden, ffn),
        "model.norm": (hidden,),
    }
    return {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter, which the reader has to undo."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_model(
    path: Path,
    changes: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray | tuple[np.ndarray, GGMLQuantizationType]] = {},
    drop: Sequence[str] = (),
    quant: GGMLQuantizationType = GGMLQuantizationType.F32,
    hidden: int = HIDDEN,
) -> Path:
    """Write a whole model with `gguf.GGUFWriter`; matrices are stored as `quant`.

    `extra` has GGUF names and arrays, or the bytes of quantised rows and their type.
    """
    writer = gguf.GGUFWriter(path, "llama")
    values = metadata() | {"llama.embedding_length": hidden, "llama.feed_forward_length": 2 * hidden} | dict(changes)
    for key, value in values.items():
        if key != "general.architecture" and value is not None:
            add_value(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, array in weights(hidden).items():
        stored = names.get_name(name, (".weight",))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        rows = permute(array, heads) if heads else array
        if stored in drop:
            continue
        if rows.ndim == 2:
            writer.add_tensor(stored, quantize(rows, quant), raw_dtype=quant)
        else:
            writer.add_tensor(stored, rows)
    for name, array in extra.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        else:
            writer.add_tensor(name, array)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, np.float32):
        writer.add_key_value(key, float(value), GGUFValueType.FLOAT32)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """A metadata entry as bytes."""
    return text(key) + struct.pack("<I", kind) + payload


def place(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor entry as bytes; kind 0 is F32."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    entries: Sequence[bytes] = (),
    places: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    entry_count: int | None = None,
    place_count: int | None = None,
) -> bytes:
    """A GGUF container; the counts may lie."""
    counts = (
        len(places) if place_count is None else place_count,
        len(entries) if entry_count is None else entry_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(places)
    return header + bytes(-len(header) % 32) + data


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` may be JSON text that no dict can be."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data
