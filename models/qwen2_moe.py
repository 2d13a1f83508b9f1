"""Qwen 2 MoE and Qwen 1.5 MoE: Qwen 2 with a mixture of experts, and one shared expert that sees every token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, Stack
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import Attention, Block, Decoder, GatedMlp, SparseMoe
from .layers import Experts, Linear, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class QwenMoeConfig(DecoderConfig):
    """What the families with experts have in common. sparse: which layers have experts, the others an MLP."""

    rms_norm_eps: float
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]
    rope: RopeConfig

    def experts(self) -> Experts:
        """The experts of one layer."""
        sizes = (self.num_experts, self.hidden_size, self.moe_intermediate_size)
        return Experts(*sizes, top_k=self.num_experts_per_tok, normalize=self.norm_topk_prob)


def read_qwen_moe(read: ConfigReader, *, experts: int, chosen: int, width: int) -> dict[str, Any]:
    """The fields of `QwenMoeConfig`; experts, chosen and width are the family's defaults.

    Raises:
        ConfigError: a value is missing or not supported.
    """
    read.choice("hidden_act", ("silu",), "silu")
    decoder = read_decoder(read)
    count = read.integer("num_local_experts" if read.has("num_local_experts") else "num_experts", experts)
    step, dense = read.integer("decoder_sparse_step", 1), read.integers("mlp_only_layers", None, ())
    layers = range(decoder["num_hidden_layers"])
    return {
        **decoder,
        "rms_norm_eps": read.number("rms_norm_eps", 1e-6),
        "moe_intermediate_size": read.integer("moe_intermediate_size", width),
        "num_experts": count,
        "num_experts_per_tok": read.integer("num_experts_per_tok", chosen, maximum=count),
        "norm_topk_prob": read.boolean("norm_topk_prob", False),
        "sparse": tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
        "rope": read_rope(read, decoder["head_dim"]),
    }


@dataclass(frozen=True, slots=True)
class Qwen2MoeConfig(QwenMoeConfig):
    """windows: each layer's attention window, 0 for the whole past."""

    qkv_bias: bool
    windows: tuple[int, ...]
    shared_expert_intermediate_size: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Qwen2MoeConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Qwen 2 MoE does not compute."""
        read = ConfigReader(values)
        common = read_qwen_moe(read, experts=60, chosen=4, width=1408)
        layers = range(common["num_hidden_layers"])
        window = read.integer_or_off("sliding_window", 4096) if read.boolean("use_sliding_window", False) else 0
        last = read.integer("max_window_layers", 28, minimum=0) if window else 0
        return cls(
            **common,
            qkv_bias=read.boolean("qkv_bias", True),
            windows=read_windows(read, window, [layer < last and layer % 2 == 0 for layer in layers]),
            shared_expert_intermediate_size=read.integer("shared_expert_intermediate_size", 5632),
        )


class SharedExpertMoe(SparseMoe):
    """`SparseMoe`, and an MLP for every token, weighted by a gate of its own."""

    def __init__(self, hidden_size: int, experts: Experts, shared_expert: GatedMlp) -> None:
        super().__init__(hidden_size, experts)
        self.shared_expert = shared_expert
        self.shared_expert_gate = Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return super().forward(x) + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class Qwen2Moe(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Qwen2MoeConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)

        def mlp(sparse: bool) -> nn.Module:
            if not sparse:
                return GatedMlp(cfg.hidden_size, cfg.intermediate_size, "silu")
            shared_expert = GatedMlp(cfg.hidden_size, cfg.shared_expert_intermediate_size, "silu")
            return SharedExpertMoe(cfg.hidden_size, cfg.experts(), shared_expert)

        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=Attention(cfg, rotary_emb, qkv_bias=cfg.qkv_bias, window=window),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=mlp(sparse),
            )
            for window, sparse in zip(cfg.windows, cfg.sparse, strict=True)
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


_EXPERTS = "model.layers.{layer}.mlp.experts"

QWEN_STACKS = (
    Stack(
        f"{_EXPERTS}.gate_up_proj",
        (f"{_EXPERTS}.{{expert}}.gate_proj.weight", f"{_EXPERTS}.{{expert}}.up_proj.weight"),
    ),
    Stack(f"{_EXPERTS}.down_proj", (f"{_EXPERTS}.{{expert}}.down_proj.weight",)),
)
"""The experts of a checkpoint, each by itself, as `Experts` holds them."""

QWEN2_MOE = Architecture(
    names=("Qwen2MoeForCausalLM",),
    read_config=Qwen2MoeConfig.read,
    build=Qwen2Moe,
    stacks=QWEN_STACKS,
)
