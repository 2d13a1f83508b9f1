"""Which checkpoint tensor each GGUF tensor is, or which ones: llama.cpp merges some."""

from dataclasses import replace
from pathlib import Path

from gguf import GGML_QUANT_SIZES

from ... import CheckpointError
from ..architecture import GgufLayout
from .gguf_reader import GgufFile, GgufTensor
from .gguf_rope import ROPE_FACTORS

_MAX_PARTS = 1 << 12  # of one tensor: a norm a head, and heads are hundreds


def rename(path: Path, file: GgufFile, layout: GgufLayout) -> dict[str, GgufTensor]:
    """The file's tensors by the checkpoint's names; a merged one is cut into rows.

    Raises:
        CheckpointError: the architecture has no name for a tensor, two claim one name, or one cannot be cut.
    """
    renamed: dict[str, GgufTensor] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        if name in ROPE_FACTORS:
            continue
        names = layout.hf_names(name, min(tensor.shape[0], _MAX_PARTS + 1))
        if not names:
            unknown.append(name)
        for new, part in zip(names, _cut(path, tensor, len(names)), strict=True):
            if new in renamed:
                raise CheckpointError(f"{path}: {renamed[new].name} and {name} are both {new}")
            renamed[new] = part
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} tensors are unknown to {layout.name}: {', '.join(unknown[:8])}")
    return renamed


def _cut(path: Path, tensor: GgufTensor, count: int) -> list[GgufTensor]:
    """As many parts, of as many rows each; parts of one row have no dimension for it."""
    if count <= 1:
        return [tensor] * count
    rows, *rest = tensor.shape
    whole_blocks = bool(rest) or rows // count % GGML_QUANT_SIZES[tensor.type][0] == 0
    if count > _MAX_PARTS or rows % count or not whole_blocks:
        raise CheckpointError(f"{path}: {tensor.name} of shape {list(tensor.shape)} cannot be cut into {count} tensors")
    shape = (rows // count, *rest) if rows > count or not rest else tuple(rest)
    size = tensor.nbytes // count
    return [replace(tensor, shape=shape, offset=tensor.offset + part * size, nbytes=size) for part in range(count)]
