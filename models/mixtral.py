"""Mixtral: Mistral with a mixture of experts in place of each MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufLayout, Stack
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Decoder, SparseMoe
from .layers import Experts, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class MixtralConfig(DecoderConfig):
    """sliding_window: of every layer's attention, 0 for the whole past."""

    rms_norm_eps: float
    sliding_window: int
    num_local_experts: int
    num_experts_per_tok: int
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "MixtralConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Mixtral does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(read)
        experts = read.integer("num_local_experts", 8)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            sliding_window=read.integer_or_off("sliding_window", 0),
            num_local_experts=experts,
            num_experts_per_tok=read.integer("num_experts_per_tok", 2, maximum=experts),
            rope=read_rope(read, decoder["head_dim"], theta=1e6),
        )


class MixtralBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: MixtralConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        sizes = (cfg.num_local_experts, cfg.hidden_size, cfg.intermediate_size)
        experts = Experts(*sizes, top_k=cfg.num_experts_per_tok, normalize=True)
        self.input_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, rotary_emb, window=cfg.sliding_window)
        self.post_attention_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = SparseMoe(cfg.hidden_size, experts)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        x = x + self.self_attn(self.input_layernorm(x), seqlen_offsets, start_offsets_kernel, kv_cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Mixtral(Decoder):
    """The causal language model."""

    def __init__(self, cfg: MixtralConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [MixtralBlock(cfg, rotary_emb) for _ in range(cfg.num_hidden_layers)]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


_EXPERTS = "model.layers.{layer}.block_sparse_moe.experts"
_GGUF_EXPERTS = "model.layers.{}.block_sparse_moe.experts"

MIXTRAL = Architecture(
    names=("MixtralForCausalLM",),
    read_config=MixtralConfig.read,
    build=Mixtral,
    gguf=GgufLayout(
        name="llama",
        experts=True,
        tensors={
            **GGUF_TENSORS,
            "blk.{}.ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
            "blk.{}.ffn_gate_exps": f"{_GGUF_EXPERTS}.w1",
            "blk.{}.ffn_up_exps": f"{_GGUF_EXPERTS}.w3",
            "blk.{}.ffn_down_exps": f"{_GGUF_EXPERTS}.w2",
            "blk.{}.ffn_gate.{}": f"{_GGUF_EXPERTS}.{{}}.w1",  # older files have each expert by itself
            "blk.{}.ffn_up.{}": f"{_GGUF_EXPERTS}.{{}}.w3",
            "blk.{}.ffn_down.{}": f"{_GGUF_EXPERTS}.{{}}.w2",
        },
        permuted=("q_proj", "k_proj"),
        config=lambda facts: {
            "num_local_experts": facts.keys["expert_count"],
            "num_experts_per_tok": facts.keys.get("expert_used_count"),
        },
    ),
    stacks=(
        Stack(f"{_EXPERTS}.gate_up_proj", (f"{_EXPERTS}.{{expert}}.w1.weight", f"{_EXPERTS}.{{expert}}.w3.weight")),
        Stack(f"{_EXPERTS}.down_proj", (f"{_EXPERTS}.{{expert}}.w2.weight",)),
    ),
)
