"""Gemma 2: Gemma with norms on both sides of attention and MLP, soft caps, and a window in every other layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufFacts, GgufLayout
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import GGUF_TENSORS, Attention, GatedMlp
from .gemma import GELU, GGUF_CONFIG, GemmaDecoder, OffsetRmsNorm
from .layers import RotaryEmbedding
from .rope import RopeConfig, read_rope

SANDWICH_TENSORS = {
    **GGUF_TENSORS,
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Gemma2Config(DecoderConfig):
    """windows: each layer's attention window, 0 for the whole past. Soft caps: 0 is off. norm_offset: see Gemma."""

    rms_norm_eps: float
    norm_offset: float
    attention_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float
    final_logit_softcapping: float
    windows: tuple[int, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Gemma2Config":
        """Read config.json as a mapping; raises `ConfigError` on what Gemma 2 does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_activation", (GELU,), GELU)
        read.refuse("use_bidirectional_attention", "attention is causal here")
        decoder = read_decoder(read, tie_word_embeddings=True)
        layers = range(decoder["num_hidden_layers"])
        window = read.integer_or_off("sliding_window", 4096)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            norm_offset=read.number("norm_offset", 1.0, positive=False),
            attention_bias=read.boolean("attention_bias", False),
            query_pre_attn_scalar=read.number("query_pre_attn_scalar", 256),
            attn_logit_softcapping=read.number_or_off("attn_logit_softcapping", 50.0),
            final_logit_softcapping=read.number_or_off("final_logit_softcapping", 30.0),
            windows=read_windows(read, window, [layer % 2 == 0 for layer in layers]),
            rope=read_rope(read, decoder["head_dim"]),
        )


class SandwichBlock(nn.Module):
    """Transformer block with a norm before and after attention, and before and after the MLP."""

    def __init__(
        self,
        *,
        input_layernorm: nn.Module,
        self_attn: nn.Module,
        post_attention_layernorm: nn.Module,
        pre_feedforward_layernorm: nn.Module,
        mlp: nn.Module,
        post_feedforward_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.mlp = mlp
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        attended = self.self_attn(self.input_layernorm(x), seqlen_offsets, start_offsets_kernel, kv_cache)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(GemmaDecoder):
    """The causal language model."""

    def __init__(self, cfg: Gemma2Config, max_positions: int) -> None:
        bias, norm = cfg.attention_bias, (cfg.hidden_size, cfg.rms_norm_eps, cfg.norm_offset)
        scale, cap = cfg.query_pre_attn_scalar**-0.5, cfg.attn_logit_softcapping
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            SandwichBlock(
                input_layernorm=OffsetRmsNorm(*norm),
                self_attn=Attention(
                    cfg, rotary_emb, qkv_bias=bias, out_bias=bias, scale=scale, window=window, softcap=cap
                ),
                post_attention_layernorm=OffsetRmsNorm(*norm),
                pre_feedforward_layernorm=OffsetRmsNorm(*norm),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, GELU),
                post_feedforward_layernorm=OffsetRmsNorm(*norm),
            )
            for window in cfg.windows
        ]
        super().__init__(cfg, layers, OffsetRmsNorm(*norm))
        self.final_logit_softcapping = cfg.final_logit_softcapping


def gguf_query_scalar(keys: Mapping[str, Any], layers_of_27b: int) -> float:
    """What a GGUF does not hold, by llama.cpp's rule: the width of a head, but hidden/heads in the model of 27 B."""
    if keys["block_count"] == layers_of_27b:
        return float(keys["embedding_length"] / keys["attention.head_count"])
    return float(keys["attention.key_length"])


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    keys = facts.keys
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    config = {cap: keys[cap] for cap in caps if cap in keys}
    return {**GGUF_CONFIG, **config, "query_pre_attn_scalar": gguf_query_scalar(keys, 46)}


GEMMA2 = Architecture(
    names=("Gemma2ForCausalLM",),
    read_config=Gemma2Config.read,
    build=Gemma2,
    gguf=GgufLayout(name="gemma2", tensors=SANDWICH_TENSORS, config=_gguf_config),
)
