"""Granite 3: Llama with four multipliers, on the embedding, on q·k, on what a block adds, and on the logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufLayout
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Decoder, GatedMlp
from .layers import ACTIVATIONS, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class GraniteConfig(DecoderConfig):
    """The multipliers are factors; logits_scaling is a divisor."""

    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "GraniteConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Granite does not compute."""
        read = ConfigReader(values)
        decoder = read_decoder(read)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=read.boolean("attention_bias", False),
            mlp_bias=read.boolean("mlp_bias", False),
            embedding_multiplier=read.number("embedding_multiplier", 1.0),
            attention_multiplier=read.number("attention_multiplier", 1.0),
            residual_multiplier=read.number("residual_multiplier", 1.0),
            logits_scaling=read.number("logits_scaling", 1.0),
            rope=read_rope(read, decoder["head_dim"]),
        )


class GraniteBlock(nn.Module):
    """Pre-norm transformer block that scales what it adds to the residual stream."""

    def __init__(self, cfg: GraniteConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        bias, scale = cfg.attention_bias, cfg.attention_multiplier
        self.input_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, rotary_emb, qkv_bias=bias, out_bias=bias, scale=scale)
        self.post_attention_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)
        self.residual_multiplier = cfg.residual_multiplier

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        attended = self.self_attn(self.input_layernorm(x), seqlen_offsets, start_offsets_kernel, kv_cache)
        x = x + attended * self.residual_multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_multiplier


class Granite(Decoder):
    """The causal language model."""

    def __init__(self, cfg: GraniteConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [GraniteBlock(cfg, rotary_emb) for _ in range(cfg.num_hidden_layers)]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))
        self.embedding_multiplier = cfg.embedding_multiplier
        self.logits_scaling = cfg.logits_scaling

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        return super().embed(input_ids) * self.embedding_multiplier

    def head(self, x: Tensor) -> Tensor:
        """(B, K, H) -> logits (B, K, V)."""
        return super().head(x) / self.logits_scaling


_GGUF_KEYS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

GRANITE = Architecture(
    names=("GraniteForCausalLM",),
    read_config=GraniteConfig.read,
    build=Granite,
    gguf=GgufLayout(
        name="granite",
        tensors=GGUF_TENSORS,
        permuted=("q_proj", "k_proj"),
        config=lambda facts: {name: facts.keys[key] for key, name in _GGUF_KEYS.items() if key in facts.keys},
    ),
)
