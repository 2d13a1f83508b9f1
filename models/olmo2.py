"""OLMo 2: norms behind attention and MLP instead of in front, and QK-norm over the full width of q and of k."""

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
class Olmo2Config(DecoderConfig):
    """What OLMo 2 adds to every decoder's configuration."""

    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Olmo2Config":
        """Read config.json as a mapping; raises `ConfigError` on what OLMo 2 does not compute."""
        read = ConfigReader(values)
        read.refuse("sliding_window", "OLMo 2 has no windowed attention")
        read.refuse("clip_qkv", "OLMo 2 has QK-norm instead")
        decoder = read_decoder(read)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=read.boolean("attention_bias", False),
            rope=read_rope(read, decoder["head_dim"]),
        )


class Olmo2Attention(Attention):
    """Attention with an RMS norm over all heads of q together, and of k."""

    def __init__(self, cfg: Olmo2Config, rotary_emb: RotaryEmbedding) -> None:
        super().__init__(cfg, rotary_emb, qkv_bias=cfg.attention_bias, out_bias=cfg.attention_bias)
        self.q_norm = RmsNorm(cfg.num_attention_heads * cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RmsNorm(cfg.num_key_value_heads * cfg.head_dim, cfg.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) -> q (B, S, Hq*D), k and v (B, S, Hkv*D)."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Olmo2Block(nn.Module):
    """Transformer block that norms what attention and MLP add to the residual stream."""

    def __init__(self, cfg: Olmo2Config, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(cfg, rotary_emb)
        self.post_attention_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.post_feedforward_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        x = x + self.post_attention_layernorm(self.self_attn(x, seqlen_offsets, start_offsets_kernel, kv_cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Olmo2(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Olmo2Config, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [Olmo2Block(cfg, rotary_emb) for _ in range(cfg.num_hidden_layers)]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


OLMO2 = Architecture(
    names=("Olmo2ForCausalLM",),
    read_config=Olmo2Config.read,
    build=Olmo2,
    gguf=GgufLayout(
        name="olmo2",
        tensors={
            **{
                name: module
                for name, module in GGUF_TENSORS.items()
                if name not in ("blk.{}.attn_norm", "blk.{}.ffn_norm")
            },
            "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
            "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
            "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
            "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
        },
    ),
)
