"""What a checkpoint is to the rest of Zonda, whatever file format it has."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..quantization import BlockQuantized, Form

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that travel from a checkpoint into the bundle."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that `Checkpoint.load` gives as they are; all others it dequantises."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape and dtype as `load` returns the tensor; stored: the type in the file (`BF16`, `Q4_1`).

    form: as `blocks` returns the tensor; None if it can only be had in floats.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that was merged. scale: as the user gave it. sha256: hex, of each of its files."""

    name: str
    scale: float
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights in floats were put into blocks. quant: `int8` or `int4`. weights: how many were.

    raised: how many of them have 8 bits although `int4` would have given them 4.
    """

    quant: str
    weights: int
    raised: int


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """name: as the user gave it, without folders. format: `safetensors BF16`, `GGUF Q4_1`. revision: a hub commit.

    adapters: what was merged into its weights, in that order. quantization: of weights that the files have in floats.
    """

    name: str
    format: str
    revision: str | None = None
    adapters: tuple[AdapterSource, ...] = ()
    quantization: Quantization | None = None


class Checkpoint(Protocol):
    """Weights under the names that the architecture's modules have, and everything else a model comes with.

    kind: which loader a bundle of it needs. config: in the form of an HF config.json. tensors: by name.
    files: the text files of `TEXT_FILES` that there are.
    """

    kind: Literal["normal", "gguf"]
    source: CheckpointSource
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, bytes]

    def load(self, name: str) -> Tensor:
        """One tensor, mapped from the file where its form allows, else dequantised to float32.

        Raises:
            CheckpointError: the file no longer holds what it held when it was opened.
        """

    def blocks(self, name: str) -> BlockQuantized | None:
        """One matrix or vector as it is stored, not dequantised; None if its `TensorInfo.form` is None.

        Raises:
            CheckpointError: as of `load`; or one of its scales or minima is not a finite number.
        """

    def sha256(self) -> dict[str, str]:
        """The hex sha256 of each weight file, by file name."""


class CheckpointView:
    """A checkpoint that shows another one's tensors; its children change some of them. See `Checkpoint`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        *,
        source: CheckpointSource | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.kind: Literal["normal", "gguf"] = checkpoint.kind
        self.source = checkpoint.source if source is None else source
        self.config = checkpoint.config if config is None else config
        self.tensors = tensors
        self.files = checkpoint.files

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._checkpoint.load(name)

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`."""
        return self._checkpoint.blocks(name)

    def sha256(self) -> dict[str, str]:
        """See `Checkpoint`."""
        return self._checkpoint.sha256()


def files_sha256(paths: list[Path]) -> dict[str, str]:
    """The hex sha256 of each file, by file name."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
