"""Qwen 3: Qwen 2 without biases, and with an RMS norm over each head of q and of k in front of RoPE."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Block, Decoder, GatedMlp, QkNormAttention
from .layers import ACTIVATIONS, RmsNorm, RotaryEmbedding
from .qwen2 import read_qwen_windows
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Qwen3Config(DecoderConfig):
    """windows: each layer's attention window, 0 for the whole past."""

    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    windows: tuple[int, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Qwen3Config":
        """Read config.json as a mapping; raises `ConfigError` on what Qwen 3 does not compute."""
        read = ConfigReader(values)
        decoder = read_decoder(read)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=read.boolean("attention_bias", False),
            windows=read_qwen_windows(read, decoder["num_hidden_layers"]),
            rope=read_rope(read, decoder["head_dim"]),
        )


class Qwen3(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Qwen3Config, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=QkNormAttention(
                    cfg,
                    rotary_emb,
                    q_norm=RmsNorm(cfg.head_dim, cfg.rms_norm_eps),
                    k_norm=RmsNorm(cfg.head_dim, cfg.rms_norm_eps),
                    bias=cfg.attention_bias,
                    window=window,
                ),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act),
            )
            for window in cfg.windows
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


QWEN3 = Architecture(
    names=("Qwen3ForCausalLM",),
    read_config=Qwen3Config.read,
    build=Qwen3,
    gguf=GgufLayout(
        name="qwen3",
        tensors={
            **GGUF_TENSORS,
            "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
            "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
        },
    ),
)
