"""What the rest of Zonda knows of a model architecture: one `Architecture` value a family, made in its own file.

It knows nothing of ONNX, engines or checkpoints' file formats; it only says how names and rows map.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .cache import Cache, KvShape
from .rope import settle_regime

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
"""A number between the dots of a tensor's name: a layer's, an expert's."""


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF tells of its model's configuration.

    keys: metadata without the `{name}.` prefix. tensors: the names of all tensors, as the file has them.
    config: the entries of an HF config.json that all families have, already read.
    """

    keys: Mapping[str, Any]
    tensors: Collection[str]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How llama.cpp writes this family.

    name: the value of `general.architecture`.
    tensors: GGUF's modules -> the checkpoint's (`blk.{}.attn_q` -> `model.layers.{}.self_attn.q_proj`), or whole names,
        where weight and bias part. `{}` stands for a number in both. A tuple of names shares the tensor's rows equally;
        a name with one `{}` more is of as many tensors as there are rows.
    permuted: last module names (`q_proj`) whose rows are stored permuted for llama.cpp's interleaved RoPE.
    epsilon: the norms' epsilon, as metadata without the prefix and as an entry of the HF config.json.
    experts: whether the files have experts; it tells two families of one name apart.
    config: entries of an HF config.json that the common mapping does not produce, or produces wrongly.
    rstrip: special tokens of a SentencePiece vocabulary swallow the white space behind them, except those for begin,
        unknown and padding; the files do not say so.
    """

    name: str
    tensors: Mapping[str, str | tuple[str, ...]]
    permuted: tuple[str, ...] = ()
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    experts: bool = False
    config: Callable[[GgufFacts], dict[str, Any]] | None = None
    rstrip: bool = False

    def hf_names(self, name: str, rows: int) -> list[str]:
        """The checkpoint's names of a GGUF tensor of `rows` rows, which they share equally; none if it is unknown.

        `blk.3.attn_q.weight` -> [`model.layers.3.self_attn.q_proj.weight`].
        """
        module, _, kind = name.rpartition(".")
        numbers = _NUMBER.findall(name)
        for whole, suffix in ((name, ""), (module, f".{kind}")):
            known = self.tensors.get(_NUMBER.sub("{}", whole))
            if known is not None:
                patterns = (known,) if isinstance(known, str) else known
                counted = (
                    [[*numbers, row] for row in range(rows)] if patterns[0].count("{}") > len(numbers) else [numbers]
                )
                return [pattern.format(*places) + suffix for places in counted for pattern in patterns]
        return []


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
