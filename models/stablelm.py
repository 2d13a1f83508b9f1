"""StableLM 1 and 2: LayerNorm, partial rotary; the largest has parallel blocks and a norm of its own for each head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import Architecture, GgufFacts, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Block, Decoder, GatedMlp, ParallelBlock
from .layers import ACTIVATIONS, LayerNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class StableLmConfig(DecoderConfig):
    """What StableLM adds to every decoder's configuration."""

    layer_norm_eps: float
    hidden_act: str
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "StableLmConfig":
        """Read config.json as a mapping; raises `ConfigError` on what StableLM does not compute."""
        read = ConfigReader(values)
        decoder = read_decoder(read)
        return cls(
            **decoder,
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            use_qkv_bias=read.boolean("use_qkv_bias", False),
            qk_layernorm=read.boolean("qk_layernorm", False),
            use_parallel_residual=read.boolean("use_parallel_residual", False),
            rope=read_rope(read, decoder["head_dim"], partial_rotary_factor=0.25),
        )


class Gain(nn.Module):
    """One head's gain (D,), by itself because the checkpoint has it by itself."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim), requires_grad=False)

    def forward(self) -> Tensor:
        """-> (D,)."""
        return self.weight


class HeadNorms(nn.Module):
    """Layer normalisation of each head with its own gain and no bias."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Gain(head_dim) for _ in range(num_heads))
        self.head_dim = head_dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, heads*D) -> (B, S, heads*D)."""
        heads = F.layer_norm(x.unflatten(-1, (-1, self.head_dim)), (self.head_dim,), eps=self.eps)
        return (heads * torch.stack([gain() for gain in self.norms])).flatten(-2)


class StableLmAttention(Attention):
    """Attention with norms over each head of q and of k, if the configuration asks for them."""

    def __init__(self, cfg: StableLmConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__(cfg, rotary_emb, qkv_bias=cfg.use_qkv_bias)
        if cfg.qk_layernorm:
            self.q_layernorm: nn.Module = HeadNorms(cfg.num_attention_heads, cfg.head_dim, cfg.layer_norm_eps)
            self.k_layernorm: nn.Module = HeadNorms(cfg.num_key_value_heads, cfg.head_dim, cfg.layer_norm_eps)
        else:
            self.q_layernorm = self.k_layernorm = nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) -> q (B, S, Hq*D), k and v (B, S, Hkv*D)."""
        q, k, v = super().project(x)
        return self.q_layernorm(q), self.k_layernorm(k), v


class StableLm(Decoder):
    """The causal language model."""

    def __init__(self, cfg: StableLmConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)

        def block() -> nn.Module:
            input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
            self_attn = StableLmAttention(cfg, rotary_emb)
            mlp = GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
            if cfg.use_parallel_residual:
                return ParallelBlock(input_layernorm=input_layernorm, self_attn=self_attn, mlp=mlp)
            return Block(
                input_layernorm=input_layernorm,
                self_attn=self_attn,
                post_attention_layernorm=LayerNorm(cfg.hidden_size, cfg.layer_norm_eps),
                mlp=mlp,
            )

        layers = [block() for _ in range(cfg.num_hidden_layers)]
        super().__init__(cfg, layers, LayerNorm(cfg.hidden_size, cfg.layer_norm_eps))


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    """The key `use_parallel_residual` is true in files of either form; llama.cpp goes by the second norm, as we do."""
    facts.keys.get("use_parallel_residual")
    return {
        "use_qkv_bias": facts.config["attention_bias"],
        "qk_layernorm": "blk.0.attn_q_norm.weight" in facts.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in facts.tensors,
    }


STABLELM = Architecture(
    names=("StableLmForCausalLM",),
    read_config=StableLmConfig.read,
    build=StableLm,
    gguf=GgufLayout(
        name="stablelm",
        tensors={
            **GGUF_TENSORS,
            "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_layernorm.norms.{}",
            "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_layernorm.norms.{}",
        },
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        config=_gguf_config,
    ),
)
