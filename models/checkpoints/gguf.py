"""A GGUF file as a checkpoint: tensors get HF names, HF row order and float values; nothing is kept in memory."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from ... import CheckpointError
from .. import registry
from ..quantization import BlockQuantized, Form
from .base import FLOATS, CheckpointSource, TensorInfo, files_sha256
from .gguf_blocks import form_of, read_rows
from .gguf_config import read_config
from .gguf_names import rename
from .gguf_reader import GgufFile, GgufTensor
from .gguf_rope import ROPE_FACTORS
from .gguf_split import read_gguf_parts
from .gguf_tokenizer import tokenizer_files

_log = logging.getLogger(__name__)

_FLOATS = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_MAX_FREQUENCIES = 1 << 12  # half a head's width
_CHUNK = 1 << 20  # elements dequantised at a time: the peak is the tensor and a little


class GgufCheckpoint:
    """See `Checkpoint`."""

    kind: Literal["normal", "gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        """Read the header, translate metadata and names.

        Raises:
            CheckpointError: the file is unsound, misses what a model needs, or uses what is not supported.
            UnsupportedArchitectureError: of an architecture that Zonda does not have.
        """
        self._path = path
        self._file = read_gguf_parts(path)
        metadata = self._file.metadata
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: the metadata key 'general.architecture' is missing, or no text")
        architecture = registry.find_gguf(name, experts=bool(metadata.get(f"{name}.expert_count")))
        assert architecture.gguf is not None
        self._layout = architecture.gguf
        _refuse_types(path, self._file)
        self._stored = rename(path, self._file, self._layout)
        self.files: Mapping[str, bytes] = tokenizer_files(path, metadata, rstrip=self._layout.rstrip)
        factors = _rope_factors(path, self._file)
        self.config: dict[str, Any] = read_config(path, self._file, self._layout, architecture.names[0], factors)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                tensor.shape,
                _FLOATS.get(tensor.type, torch.float32),
                tensor.type.name,
                form_of(tensor.type) if len(tensor.shape) <= 2 else None,
            )
            for name, tensor in self._stored.items()
        }
        formless = {info.stored for info in self.tensors.values() if info.form is None}.difference(FLOATS)
        if formless:
            _log.warning("%s: tensors of %s are dequantised to float32", path, ", ".join(sorted(formless)))
        weights: Counter[str] = Counter()
        for tensor in self._stored.values():
            weights[tensor.type.name] += math.prod(tensor.shape)
        self.source = CheckpointSource(path.name, f"GGUF {weights.most_common(1)[0][0]}")

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        tensor, order = self._find(name)
        values = _values(self._file, tensor, order)
        self._file.release()
        return values

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`."""
        form = self.tensors[name].form
        if form is None:
            return None
        tensor, order = self._find(name)
        blocks = _blocks(self._file, tensor, form, order)
        self._file.release()
        if not all(part is None or part.isfinite().all() for part in (blocks.scales, blocks.offsets)):
            raise CheckpointError(
                f"{self._path}: {tensor.name} has a scale or minimum that is not a finite number; download it again"
            )
        return blocks

    def sha256(self) -> dict[str, str]:
        """See `Checkpoint`."""
        return files_sha256([part.path for part in self._file.parts])

    def _find(self, name: str) -> tuple[GgufTensor, Tensor | None]:
        """A tensor and which row each of its stored rows becomes, None if they lie in order."""
        tensor = self._stored[name]
        module = name.split(".")[-2]
        order = None
        if module in self._layout.permuted:
            heads = self.config["num_key_value_heads" if module == "k_proj" else "num_attention_heads"]
            if tensor.shape[0] % (2 * heads):
                raise CheckpointError(f"{self._path}: the {tensor.shape[0]} rows of {tensor.name} are no {heads} heads")
            order = _row_order(tensor.shape[0], heads)
        return tensor, order


def _refuse_types(path: Path, file: GgufFile) -> None:
    """Raise for a tensor type that cannot be dequantised, before anything is loaded."""
    for tensor in {tensor.type: tensor for tensor in file.tensors.values() if tensor.type not in _FLOATS}.values():
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[tensor.type][1], np.uint8), tensor.type)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: {tensor.name} is stored as {tensor.type.name}, which cannot be read"
            ) from None


def _rope_factors(path: Path, file: GgufFile) -> dict[str, list[float]]:
    """The tensors that scale RoPE, by name."""
    found = {name: file.tensors[name] for name in ROPE_FACTORS if name in file.tensors}
    for name, tensor in found.items():
        if math.prod(tensor.shape) > _MAX_FREQUENCIES:
            raise CheckpointError(
                f"{path}: {name} has {math.prod(tensor.shape):,} numbers, more than a head can turn by"
            )
    return {name: _values(file, tensor, None).double().flatten().tolist() for name, tensor in found.items()}


def _values(file: GgufFile, tensor: GgufTensor, order: Tensor | None) -> Tensor:
    """The tensor as torch has it; `order` says which row each stored row becomes. Blocks never cross rows."""
    dtype = _FLOATS.get(tensor.type, torch.float32)
    elements = math.prod(tensor.shape)
    if order is not None:
        rows = tensor.shape[0]
    elif len(tensor.shape) == 1:
        rows = elements if tensor.type in _FLOATS else 1
    else:
        rows = elements // tensor.shape[-1]
    columns = elements // rows
    values = torch.empty(rows, columns, dtype=dtype)
    for where, part in _chunks(file.raw(tensor).reshape(rows, -1), columns, order):
        if tensor.type in _FLOATS:
            values[where] = torch.from_numpy(part.copy()).view(dtype)
        else:
            values[where] = torch.from_numpy(dequantize(part, tensor.type))
    return values.reshape(tensor.shape)


def _blocks(file: GgufFile, tensor: GgufTensor, form: Form, order: Tensor | None) -> BlockQuantized:
    """The tensor (N, K) or (K,), not dequantised; `order` as of `_values`."""
    rows, columns = (1, *tensor.shape)[-2:]
    codes = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, columns // form.block_size)
    offsets = torch.empty_like(scales) if form.offsets else None
    for where, part in _chunks(file.raw(tensor).reshape(rows, -1), columns, order):
        for whole, read in zip((codes, scales, offsets), read_rows(part, tensor.type), strict=True):
            if whole is not None and read is not None:
                whole[where] = torch.from_numpy(read)
    if len(tensor.shape) == 1:
        codes, scales, offsets = codes[0], scales[0], None if offsets is None else offsets[0]
    return BlockQuantized(form.bits, form.block_size, codes, scales, offsets)


def _chunks(
    stored: NDArray[np.uint8], columns: int, order: Tensor | None
) -> Iterator[tuple[slice | Tensor, NDArray[np.uint8]]]:
    """Some raw rows at a time, and where they belong."""
    step = max(1, _CHUNK // columns)
    for start in range(0, len(stored), step):
        part = stored[start : start + step]
        yield slice(start, start + len(part)) if order is None else order[start : start + step], part


def _row_order(rows: int, heads: int) -> Tensor:
    """Where llama.cpp's rows belong: its interleaved RoPE wants (heads, D/2, 2), the checkpoint has (heads, 2, D/2)."""
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).flatten()
