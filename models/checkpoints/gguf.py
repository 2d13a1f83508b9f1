"""A GGUF file as a checkpoint: metadata becomes an HF config, tensors get HF names and row order, float32 values."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from ... import CheckpointError
from .. import registry
from ..architecture import GgufLayout
from .base import CheckpointSource, TensorInfo, files_sha256
from .gguf_reader import GgufFile, GgufTensor, read_gguf
from .gguf_tokenizer import tokenizer_files

_FLOATS = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_ROPE_FACTORS = "rope_freqs.weight"  # llama.cpp's form of the llama3 scaling: a divisor a frequency


class GgufCheckpoint:
    """See `Checkpoint`."""

    kind: Literal["normal", "gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        """Read the header, translate metadata and names.

        Raises:
            CheckpointError: the file is unsound, or misses what a model needs.
            UnsupportedArchitectureError: of an architecture that Zonda does not have.
        """
        if (split := _SPLIT.search(path.name)) and split[1] != "00001":
            raise CheckpointError(f"{path} is one of {int(split[1])} parts; join them with llama-gguf-split --merge")
        self._path = path
        self._file = read_gguf(path)
        metadata = _Metadata(path, self._file)
        architecture = registry.find_gguf(metadata.text("general.architecture"))
        assert architecture.gguf is not None
        self._layout = architecture.gguf
        self._stored = _rename(path, self._file, self._layout)
        self.config = _config(metadata, self._file, self._layout, architecture.names[0], self._stored)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.shape, _FLOATS.get(tensor.type, torch.float32), tensor.type.name)
            for name, tensor in self._stored.items()
        }
        weights = [tensor.type.name for tensor in self._stored.values() if len(tensor.shape) > 1]
        common = max(sorted(set(weights)), key=weights.count) if weights else "empty"
        self.source = CheckpointSource(path.name, f"GGUF {common}")
        self.files: Mapping[str, bytes] = tokenizer_files(path, self._file.metadata)

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        tensor = self._stored[name]
        array = _values(self._path, tensor, self._file.raw(tensor))
        parts = name.split(".")
        if len(parts) > 1 and parts[-2] in self._layout.permuted:
            heads = "num_key_value_heads" if parts[-2] == "k_proj" else "num_attention_heads"
            array = _unpermute(array, self.config[heads])
        owned = np.require(array, requirements=["C", "W"])  # a copy if it was still a view of the file
        self._file.release()
        return torch.from_numpy(owned)

    def sha256(self) -> dict[str, str]:
        """See `Checkpoint`."""
        return files_sha256([self._path])


class _Metadata:
    """Typed reads of the metadata of one architecture."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self._path = path
        self._values = file.metadata

    def text(self, key: str) -> str:
        return str(self._read(key, lambda v: isinstance(v, str), "a text"))

    def integer(self, key: str) -> int:
        return int(
            self._read(key, lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a positive integer")
        )

    def number(self, key: str) -> float:
        return float(self._read(key, lambda v: isinstance(v, float) and np.isfinite(v) and v > 0, "a positive number"))

    def has(self, key: str) -> bool:
        return key in self._values

    def _read(self, key: str, good: Callable[[Any], bool], wanted: str) -> Any:
        if key not in self._values:
            raise CheckpointError(f"{self._path}: the metadata key {key!r} is missing")
        if not good(self._values[key]):
            raise CheckpointError(
                f"{self._path}: the metadata key {key!r} must be {wanted}, found {self._values[key]!r}"
            )
        return self._values[key]


def _config(
    metadata: _Metadata, file: GgufFile, layout: GgufLayout, name: str, stored: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """config.json as HF would have it; keys are the same for every decoder that llama.cpp writes."""
    prefix = layout.name
    heads = metadata.integer(f"{prefix}.attention.head_count")
    optional: dict[str, tuple[str, Callable[[str], Any]]] = {
        "num_key_value_heads": (f"{prefix}.attention.head_count_kv", metadata.integer),
        "head_dim": (f"{prefix}.attention.key_length", metadata.integer),
        "rope_theta": (f"{prefix}.rope.freq_base", metadata.number),
    }
    embedding = next((t for n, t in stored.items() if n.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(f"{metadata.text('general.architecture')}: the file has no token embedding")
    config: dict[str, Any] = {
        "architectures": [name],
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.integer(f"{prefix}.embedding_length"),
        "intermediate_size": metadata.integer(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.integer(f"{prefix}.context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "attention_bias": any(n.endswith("q_proj.bias") for n in stored),
        "mlp_bias": any(n.endswith("gate_proj.bias") for n in stored),
    }
    config |= {key: read(source) for key, (source, read) in optional.items() if metadata.has(source)}
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if metadata.has(f"{prefix}.rope.dimension_count"):
        rotary = metadata.integer(f"{prefix}.rope.dimension_count")
        if rotary != head_dim:
            config["partial_rotary_factor"] = rotary / head_dim
    scaling = _rope_scaling(metadata, prefix, file)
    if scaling:
        config["rope_scaling"] = scaling
    for key, source in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if metadata.has(f"tokenizer.ggml.{source}_token_id"):
            config[key] = file.metadata[f"tokenizer.ggml.{source}_token_id"]
    if layout.config is not None:
        config |= layout.config({k.removeprefix(f"{prefix}."): v for k, v in file.metadata.items()})
    return config


def _rope_scaling(metadata: _Metadata, prefix: str, file: GgufFile) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        tensor = file.tensors[_ROPE_FACTORS]
        return {"rope_type": "factors", "factors": _values(Path(_ROPE_FACTORS), tensor, file.raw(tensor)).tolist()}
    if not metadata.has(f"{prefix}.rope.scaling.type"):
        return None
    kind = metadata.text(f"{prefix}.rope.scaling.type")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number(f"{prefix}.rope.scaling.factor")}
    if metadata.has(f"{prefix}.rope.scaling.original_context_length"):
        original = metadata.integer(f"{prefix}.rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _rename(path: Path, file: GgufFile, layout: GgufLayout) -> dict[str, GgufTensor]:
    """HF name -> tensor; a tensor that the architecture has no name for is an error."""
    renamed, unknown = {}, []
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        new = layout.hf_name(name)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = tensor
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} tensors are unknown to {layout.name}: {', '.join(unknown[:8])}")
    return renamed


def _values(path: Path, tensor: GgufTensor, raw: NDArray[np.uint8]) -> NDArray[Any]:
    if tensor.type in _FLOATS:
        dtype = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}[_FLOATS[tensor.type]]
        return raw.view(dtype).reshape(tensor.shape)
    try:
        rows = raw.reshape(*tensor.shape[:-1], -1)
        values: NDArray[np.float32] = dequantize(rows, tensor.type)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: {tensor.name} is stored as {tensor.type.name}, which cannot be read") from error
    return values.reshape(tensor.shape)


def _unpermute(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's row order for its interleaved RoPE: (heads, D/2, 2) back to (heads, 2, D/2)."""
    if array.shape[0] % (2 * heads):
        raise CheckpointError(f"{array.shape[0]} rows cannot be {heads} heads")
    split = array.reshape(heads, -1, 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)
