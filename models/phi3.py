"""Phi 3, 3.5 and 4: Llama with q, k, v in one linear, gate and up in another, partial rotary and longrope."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufFacts, GgufLayout
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import Block, CachedAttention, Decoder
from .layers import ACTIVATIONS, Linear, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Phi3Config(DecoderConfig):
    """sliding_window: of every layer's attention, 0 for the whole past."""

    rms_norm_eps: float
    hidden_act: str
    sliding_window: int
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Phi3Config":
        """Read config.json as a mapping; raises `ConfigError` on what Phi 3 does not compute."""
        read = ConfigReader(values)
        for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
            read.refuse(key, "Phi 3 has no biases")
        decoder = read_decoder(read)
        old_names = {"su": "longrope", "yarn": "longrope"}
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            sliding_window=read.integer_or_off("sliding_window", 0),
            rope=read_rope(read, decoder["head_dim"], aliases=old_names),
        )


class Phi3Attention(CachedAttention):
    """Grouped-query attention; `qkv_proj` holds the rows of q, then of k, then of v."""

    def __init__(self, cfg: Phi3Config, rotary_emb: RotaryEmbedding) -> None:
        super().__init__(cfg, rotary_emb, window=cfg.sliding_window)
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.qkv_proj = Linear(cfg.hidden_size, q_size + 2 * kv_size)
        self.o_proj = Linear(q_size, cfg.hidden_size)
        self.sizes = [q_size, kv_size, kv_size]

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        q, k, v = self.qkv_proj(x).split(self.sizes, -1)
        return self.o_proj(self.attend(q, k, v, seqlen_offsets, start_offsets_kernel, kv_cache))


class Phi3Mlp(nn.Module):
    """Gated MLP; `gate_up_proj` holds the rows of gate, then of up."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = Linear(cfg.hidden_size, 2 * cfg.intermediate_size)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size)
        self.act_fn = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class Phi3(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Phi3Config, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=Phi3Attention(cfg, rotary_emb),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=Phi3Mlp(cfg),
            )
            for _ in range(cfg.num_hidden_layers)
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    """The original length is written for every Phi 3, scaled or not."""
    original = facts.keys.get("rope.scaling.original_context_length")
    return {} if original is None else {"original_max_position_embeddings": original}


PHI3 = Architecture(
    names=("Phi3ForCausalLM",),
    read_config=Phi3Config.read,
    build=Phi3,
    gguf=GgufLayout(
        name="phi3",
        tensors={
            "token_embd": "model.embed_tokens",
            "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
            "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
            "output_norm": "model.norm",
            "output": "lm_head",
        },
        config=_gguf_config,
        rstrip=True,
    ),
)
