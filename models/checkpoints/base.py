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
class CheckpointSource:
    """name: as the user gave it, without folders. format: `safetensors BF16`, `GGUF Q4_1`. revision: a hub commit."""

    name: str
    format: str
    revision: str | None = None


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


def files_sha256(paths: list[Path]) -> dict[str, str]:
    """The hex sha256 of each file, by file name."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
