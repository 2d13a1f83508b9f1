"""Qwen 3 MoE: Qwen 3 with a mixture of experts in place of the MLPs of most layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architecture import Architecture, GgufFacts, GgufLayout
from .config import ConfigReader
from .decoder import GGUF_TENSORS, Block, Decoder, GatedMlp, QkNormAttention, SparseMoe
from .layers import RmsNorm, RotaryEmbedding
from .qwen2_moe import QWEN_STACKS, QwenMoeConfig, read_qwen_moe


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(QwenMoeConfig):
    """sliding_window: of every layer's attention, 0 for the whole past."""

    attention_bias: bool
    sliding_window: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Qwen 3 MoE does not compute."""
        read = ConfigReader(values)
        windowed = read.boolean("use_sliding_window", False)
        return cls(
            **read_qwen_moe(read, experts=128, chosen=8, width=768),
            attention_bias=read.boolean("attention_bias", False),
            sliding_window=read.integer_or_off("sliding_window", 4096) if windowed else 0,
        )


class Qwen3Moe(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Qwen3MoeConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)

        def mlp(sparse: bool) -> nn.Module:
            if not sparse:
                return GatedMlp(cfg.hidden_size, cfg.intermediate_size, "silu")
            return SparseMoe(cfg.hidden_size, cfg.experts())

        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=QkNormAttention(
                    cfg,
                    rotary_emb,
                    q_norm=RmsNorm(cfg.head_dim, cfg.rms_norm_eps),
                    k_norm=RmsNorm(cfg.head_dim, cfg.rms_norm_eps),
                    bias=cfg.attention_bias,
                    window=cfg.sliding_window,
                ),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=mlp(sparse),
            )
            for sparse in cfg.sparse
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    """llama.cpp normalises the chosen experts' weights, whatever the original configuration says."""
    names = {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
    return {"norm_topk_prob": True, **{name: facts.keys[key] for key, name in names.items() if key in facts.keys}}


QWEN3_MOE = Architecture(
    names=("Qwen3MoeForCausalLM",),
    read_config=Qwen3MoeConfig.read,
    build=Qwen3Moe,
    gguf=GgufLayout(
        name="qwen3moe",
        experts=True,
        tensors={
            **GGUF_TENSORS,
            "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
            "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
            "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
            "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.gate_proj",
            "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.up_proj",
            "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.down_proj",
        },
        config=_gguf_config,
    ),
    stacks=QWEN_STACKS,
)
