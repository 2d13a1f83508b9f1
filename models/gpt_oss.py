"""GPT-OSS: attention with a sink a head and a window in every other layer, and a mixture of experts with biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, GgufFacts, GgufLayout, Stack
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import GGUF_TENSORS, Attention, Block, Decoder
from .layers import Experts, Linear, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class GptOssConfig(DecoderConfig):
    """windows: each layer's attention window, 0 for the whole past."""

    rms_norm_eps: float
    attention_bias: bool
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float
    windows: tuple[int, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "GptOssConfig":
        """Read config.json as a mapping; raises `ConfigError` on what GPT-OSS does not compute."""
        read = ConfigReader(values)
        if not read.has("rope_parameters") and not read.has("rope_scaling"):
            raise read.error("the key 'rope_scaling' is missing")
        decoder = read_decoder(read)
        experts, layers = read.integer("num_local_experts", 128), range(decoder["num_hidden_layers"])
        window = read.integer_or_off("sliding_window", 128)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            attention_bias=read.boolean("attention_bias", True),
            num_local_experts=experts,
            num_experts_per_tok=read.integer("num_experts_per_tok", 4, maximum=experts),
            swiglu_alpha=read.number("swiglu_alpha", 1.702),
            swiglu_limit=read.number("swiglu_limit", 7.0),
            windows=read_windows(read, window, [layer % 2 == 0 for layer in layers]),
            rope=read_rope(read, decoder["head_dim"], theta=150_000.0),
        )


class GptOssAttention(Attention):
    """Attention in which each head has a logit that takes part in the softmax and in nothing else."""

    def __init__(self, cfg: GptOssConfig, rotary_emb: RotaryEmbedding, window: int) -> None:
        bias = cfg.attention_bias
        super().__init__(cfg, rotary_emb, qkv_bias=bias, out_bias=bias, window=window)
        self.sinks = nn.Parameter(torch.empty(cfg.num_attention_heads), requires_grad=False)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        q, k, v = self.project(x)
        return self.o_proj(self.attend(q, k, v, seqlen_offsets, start_offsets_kernel, kv_cache, self.sinks))


class GptOssMlp(nn.Module):
    """Mixture of experts; `router` scores them for each token."""

    def __init__(self, cfg: GptOssConfig) -> None:
        super().__init__()
        self.router = Linear(cfg.hidden_size, cfg.num_local_experts, bias=True)
        self.experts = Experts(
            cfg.num_local_experts,
            cfg.hidden_size,
            cfg.intermediate_size,
            top_k=cfg.num_experts_per_tok,
            normalize=True,
            bias=True,
            alpha=cfg.swiglu_alpha,
            beta=1.0,
            limit=cfg.swiglu_limit,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.experts(x, self.router(x))


class GptOss(Decoder):
    """The causal language model."""

    def __init__(self, cfg: GptOssConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=GptOssAttention(cfg, rotary_emb, window),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=GptOssMlp(cfg),
            )
            for window in cfg.windows
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    """Files do not say that YaRN's ramp is not truncated (and llama.cpp truncates it): all published models say so."""
    names = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
    facts.keys.get("expert_feed_forward_length")  # the same as feed_forward_length
    scaling = facts.config.get("rope_scaling", {"rope_type": "default"})
    return {
        **{name: facts.keys[key] for key, name in names.items() if key in facts.keys},
        "rope_scaling": scaling | {"truncate": False},
    }


_EXPERTS = "model.layers.{layer}.mlp.experts"
_GATE_UP, _DOWN = f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj"
_GGUF_EXPERTS = "model.layers.{}.mlp.experts"

GPT_OSS = Architecture(
    names=("GptOssForCausalLM",),
    read_config=GptOssConfig.read,
    build=GptOss,
    gguf=GgufLayout(
        name="gpt-oss",
        experts=True,
        tensors={
            **GGUF_TENSORS,
            "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
            "blk.{}.attn_sinks.weight": "model.layers.{}.self_attn.sinks",
            "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.router",
            "blk.{}.ffn_gate_exps": f"{_GGUF_EXPERTS}.gate_proj",
            "blk.{}.ffn_up_exps": f"{_GGUF_EXPERTS}.up_proj",
            "blk.{}.ffn_down_exps": f"{_GGUF_EXPERTS}.down_proj",
            "blk.{}.ffn_down_exps.bias": f"{_GGUF_EXPERTS}.down_proj_bias",
        },
        config=_gguf_config,
    ),
    stacks=(
        Stack(_GATE_UP, (_GATE_UP,), transposed=True),
        Stack(_DOWN, (_DOWN,), transposed=True),
        # a GGUF has gate and up apart, and no matrix transposed
        Stack(_GATE_UP, (f"{_EXPERTS}.gate_proj.weight", f"{_EXPERTS}.up_proj.weight")),
        Stack(f"{_GATE_UP}_bias", (f"{_EXPERTS}.gate_proj.bias", f"{_EXPERTS}.up_proj.bias")),
        Stack(_DOWN, (f"{_EXPERTS}.down_proj.weight",)),
    ),
)
