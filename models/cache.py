"""The KV cache as a model sees it: one pair of buffers a layer, updated through the marker.

Eagerly every update makes a new tensor (the reference); in an exported graph each pair is an input and an output
that the engine binds to the same memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import ops


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one layer keeps per token: num_key_value_heads × key_dim keys and × value_dim values."""

    num_key_value_heads: int
    key_dim: int
    value_dim: int


class LayerCache:
    """The pair of one layer: key (B, Hkv, C, D), value (B, Hkv, C, Dv)."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value

    def update(self, key: Tensor, value: Tensor, seqlen_offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys (B, S, Hkv*D) and values (B, S, Hkv*Dv) at each row's offset; return the whole buffers."""
        self.key = ops.kv_cache_update(self.key, key, seqlen_offsets)
        self.value = ops.kv_cache_update(self.value, value, seqlen_offsets)
        return self.key, self.value


class Cache:
    """Per-layer buffers of one model; `is_xlora` says whether they belong to the second pass of an X-LoRA model.

    An X-LoRA model keeps two caches, one for the scaling pass and one for the adapted pass, and they must not be
    mixed: the flag travels with the buffers.
    """

    def __init__(self, layers: Sequence[LayerCache], is_xlora: bool = False) -> None:
        self.layers = list(layers)
        self.is_xlora = is_xlora

    @classmethod
    def zeros(
        cls,
        shapes: Sequence[KvShape],
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        is_xlora: bool = False,
    ) -> Self:
        """Allocate zeroed buffers of `capacity` positions for `batch` rows."""

        def buffer(shape: KvShape, dim: int) -> Tensor:
            return torch.zeros(batch, shape.num_key_value_heads, capacity, dim, dtype=dtype)

        return cls([LayerCache(buffer(s, s.key_dim), buffer(s, s.value_dim)) for s in shapes], is_xlora)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], is_xlora: bool = False) -> Self:
        """Wrap key, value, key, value, … in layer order."""
        return cls([LayerCache(k, v) for k, v in zip(tensors[0::2], tensors[1::2], strict=True)], is_xlora)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def tensors(self) -> Iterator[Tensor]:
        """Key, value, key, value, … in layer order."""
        for layer in self.layers:
            yield layer.key
            yield layer.value
