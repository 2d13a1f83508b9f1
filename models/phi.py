"""Phi 1, 1.5 and 2: parallel attention and MLP behind one LayerNorm, partial rotary, biases everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufLayout
from .cache import LayerCache
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, CachedAttention, Decoder, ParallelBlock
from .layers import ACTIVATIONS, LayerNorm, Linear, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class PhiConfig(DecoderConfig):
    """What Phi adds to every decoder's configuration."""

    layer_norm_eps: float
    hidden_act: str
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "PhiConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Phi does not compute."""
        read = ConfigReader(values)
        read.refuse("qk_layernorm", "no published Phi has it")
        decoder = read_decoder(read)
        return cls(
            **decoder,
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "gelu_new"),
            rope=read_rope(read, decoder["head_dim"], partial_rotary_factor=0.5),
        )


class PhiAttention(CachedAttention):
    """Grouped-query attention whose output projection is called `dense`."""

    def __init__(self, cfg: PhiConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__(cfg, rotary_emb)
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size, bias=True)
        self.k_proj = Linear(cfg.hidden_size, kv_size, bias=True)
        self.v_proj = Linear(cfg.hidden_size, kv_size, bias=True)
        self.dense = Linear(q_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.dense(self.attend(q, k, v, seqlen_offsets, start_offsets_kernel, kv_cache))


class PhiMlp(nn.Module):
    """Two linears around an activation."""

    def __init__(self, cfg: PhiConfig) -> None:
        super().__init__()
        self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size, bias=True)
        self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size, bias=True)
        self.act_fn = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.fc2(self.act_fn(self.fc1(x)))


class Phi(Decoder):
    """The causal language model."""

    def __init__(self, cfg: PhiConfig, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            ParallelBlock(
                input_layernorm=LayerNorm(cfg.hidden_size, cfg.layer_norm_eps),
                self_attn=PhiAttention(cfg, rotary_emb),
                mlp=PhiMlp(cfg),
            )
            for _ in range(cfg.num_hidden_layers)
        ]
        final_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        super().__init__(cfg, layers, final_layernorm, norm_name="final_layernorm", head_bias=True)


_ATTENTION = "model.layers.{}.self_attn"

PHI = Architecture(
    names=("PhiForCausalLM",),
    read_config=PhiConfig.read,
    build=Phi,
    gguf=GgufLayout(
        name="phi2",
        tensors={
            **GGUF_TENSORS,
            "blk.{}.attn_qkv": (f"{_ATTENTION}.q_proj", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"),  # older files
            "blk.{}.attn_output": f"{_ATTENTION}.dense",
            "blk.{}.ffn_up": "model.layers.{}.mlp.fc1",
            "blk.{}.ffn_down": "model.layers.{}.mlp.fc2",
            "output_norm": "model.final_layernorm",
        },
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        config=lambda _: {"hidden_act": "gelu_new"},
    ),
)
