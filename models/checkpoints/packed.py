"""Weights that a checkpoint keeps in several tensors (codes, scales, zero points), shown as one tensor each.

Knows no format: `awq.py`, `gptq.py` and `fp8.py` say which tensors make up which weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..quantization import BlockQuantized
from .base import Checkpoint, CheckpointView, TensorInfo


class PackedWeight(Protocol):
    """One weight (N, K). info: as `Checkpoint.tensors` shows it. sources: the tensors that make it up."""

    info: TensorInfo
    sources: tuple[str, ...]

    def load(self) -> Tensor:
        """See `Checkpoint.load`; float32."""

    def blocks(self) -> BlockQuantized | None:
        """See `Checkpoint.blocks`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a format's reader finds. weights: by name. unused: tensors that say only how to quantise activations."""

    weights: Mapping[str, PackedWeight]
    unused: tuple[str, ...] = ()


class UnpackedCheckpoint(CheckpointView):
    """See `Checkpoint`; its config has no `quantization_config`, because its weights need none to be read."""

    def __init__(self, checkpoint: Checkpoint, packed: Packed) -> None:
        self._weights = packed.weights
        gone = {source for weight in packed.weights.values() for source in weight.sources}.union(packed.unused)
        kept = {name: info for name, info in checkpoint.tensors.items() if name not in gone}
        made = {name: weight.info for name, weight in packed.weights.items()}
        forms = sorted({info.stored for info in made.values()} | {info.stored for info in kept.values()})
        unused = ["scales of activations unused"] if packed.unused else []
        super().__init__(
            checkpoint,
            kept | made,
            source=replace(checkpoint.source, format=f"safetensors {'; '.join([*forms, *unused])}"),
            config={key: value for key, value in checkpoint.config.items() if key != "quantization_config"},
        )

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._weights[name].load() if name in self._weights else super().load(name)

    def blocks(self, name: str) -> BlockQuantized | None:
        """See `Checkpoint`."""
        return self._weights[name].blocks() if name in self._weights else super().blocks(name)
