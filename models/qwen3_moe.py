"""Qwen 3 MoE: Qwen 3 with a mixture of experts in place of the MLPs of most layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architecture import Architecture, GgufFacts, GgufLayout, Stack
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Block, Decoder, GatedMlp, QkNormAttention, SparseMoe
from .layers import Experts, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(DecoderConfig):
    """sliding_window: of every layer's attention, 0 for the whole past. sparse: which layers have experts."""

    rms_norm_eps: float
    attention_bias: bool
    sliding_window: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Qwen 3 MoE does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(read)
        count = "num_local_experts" if read.has("num_local_experts") else "num_experts"
        layers, experts = decoder["num_hidden_layers"], read.integer(count, 128)
        step, dense = read.integer("decoder_sparse_step", 1), read.integers("mlp_only_layers", None, ())
        windowed = read.boolean("use_sliding_window", False)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attention_bias=read.boolean("attention_bias", False),
            sliding_window=read.integer_or_off("sliding_window", 4096) if windowed else 0,
            moe_intermediate_size=read.integer("moe_intermediate_size", 768),
            num_experts=experts,
            num_experts_per_tok=read.integer("num_experts_per_tok", 8, maximum=experts),
            norm_topk_prob=read.boolean("norm_topk_prob", False),
            sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
            rope=read_rope(read, decoder["head_dim"]),
        )


class Qwen3Moe(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Qwen3MoeConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)

        def mlp(sparse: bool) -> nn.Module:
            if not sparse:
                return GatedMlp(cfg.hidden_size, cfg.intermediate_size, "silu")
            sizes = (cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size)
            experts = Experts(*sizes, top_k=cfg.num_experts_per_tok, normalize=cfg.norm_topk_prob)
            return SparseMoe(cfg.hidden_size, experts)

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


_EXPERTS = "model.layers.{layer}.mlp.experts"

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
    stacks=(
        Stack(
            f"{_EXPERTS}.gate_up_proj",
            (f"{_EXPERTS}.{{expert}}.gate_proj.weight", f"{_EXPERTS}.{{expert}}.up_proj.weight"),
        ),
        Stack(f"{_EXPERTS}.down_proj", (f"{_EXPERTS}.{{expert}}.down_proj.weight",)),
    ),
)
