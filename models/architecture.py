"""What the rest of Zonda knows of a model architecture: one `Architecture` value a family, made in its own file.

It knows nothing of ONNX, engines or checkpoints' file formats; it only says how names and rows map.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .cache import Cache, KvShape
from .rope import settle_regime


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How llama.cpp writes this family.

    name: the value of `general.architecture`.
    tensors: module names, GGUF's -> the checkpoint's; `{}` stands for the layer number in both.
    permuted: last module names (`q_proj`) whose rows are stored permuted for llama.cpp's interleaved RoPE.
    config: metadata without the `{name}.` prefix -> entries of an HF config.json that the common mapping
        does not produce.
    """

    name: str
    tensors: Mapping[str, str]
    permuted: tuple[str, ...] = ()
    config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def hf_name(self, name: str) -> str | None:
        """The checkpoint's name of a GGUF tensor: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
        module, _, kind = name.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", module)
        known = self.tensors.get(re.sub(r"^blk\.\d+\.", "blk.{}.", module))
        return f"{known.format(layer[1] if layer else '')}.{kind}" if known is not None else None


@dataclass(frozen=True, slots=True)
class Stack:
    """One parameter of a layer's experts, (E, N, …), and what checkpoints make it of; see `stacking.py`.

    parameter: its name; `{layer}` stands for the number of the layer.
    sources: names of the tensors whose rows take turns in it, with `{layer}`, and with `{expert}.` where each expert
        has one (N, …). The name without `{expert}.` serves too: one tensor (E, N, …) with all experts in it.
    transposed: the last two dimensions are stored the other way round.
    """

    parameter: str
    sources: tuple[str, ...]
    transposed: bool = False


class CausalModel(nn.Module):
    """What every architecture's module is.

    kv_shapes: what each layer keeps per token; `Cache.zeros` and the graph's states follow it.
    """

    kv_shapes: list[KvShape]

    def forward(
        self,
        input_ids: Tensor,
        seqlen_offsets: Tensor,
        start_offsets_kernel: Tensor,
        input_lens: Tensor,
        logit_positions: Tensor,
        kv_cache: Cache,
    ) -> Tensor:
        """Logits (B, K, V) of the tokens at `logit_positions`; `kv_cache` then holds the new tokens too.

        Args:
            input_ids: (B, S) int64, right-padded new tokens.
            seqlen_offsets: (B,) int32, tokens already cached in each row.
            start_offsets_kernel: (B, S) int64, absolute position of each new token.
            input_lens: (B,) int32, valid new tokens of each row.
            logit_positions: (B, K) int64, which of the S tokens want logits.
            kv_cache: one `LayerCache` a layer.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family: how to read its configuration, how to build its module.

    names: entries of `architectures` in an HF config.json that this family serves.
    read_config: config.json as a mapping -> the family's config dataclass; raises `ConfigError`.
    build: (config, max_positions) -> the torch module, to be called under `torch.device("meta")` or not;
        max_positions is the number of rows of its RoPE tables.
    ignored: checkpoint tensors, as `fnmatch` patterns, that carry nothing (old rotary buffers).
    stacks: how parameters of experts come from the checkpoint's tensors.
    """

    names: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, int], CausalModel]
    gguf: GgufLayout | None = None
    ignored: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()

    def for_rows(self, config: Any, capacity: int, padding: int) -> CausalModel:
        """The module for rows of `capacity` tokens, with RoPE tables for `padding` positions more.

        Where RoPE's tables change with the length, the capacity chooses, not the padding that a last chunk may need.
        """
        return self.build(settle_regime(config, capacity), capacity + padding)
