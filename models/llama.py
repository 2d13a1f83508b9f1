"""The Llama family: Llama, SmolLM2 and all that came out in their form.

Parameter names are the checkpoint's own (`model.layers.0.self_attn.q_proj.weight`), so no table of names is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Block, Decoder, GatedMlp
from .layers import RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class LlamaConfig(DecoderConfig):
    """sliding_window: of every layer's attention, 0 for the whole past; Llama itself has none, Mistral may."""

    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Llama does not compute."""
        read = ConfigReader(values)
        read.refuse("sliding_window", "Llama has no windowed attention")
        return cls.read_windowed(read, 0)

    @classmethod
    def read_windowed(cls, read: ConfigReader, window: int) -> "LlamaConfig":
        """Read all but the attention's window, which is given."""
        read.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(read)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attention_bias=read.boolean("attention_bias", False),
            mlp_bias=read.boolean("mlp_bias", False),
            sliding_window=window,
            rope=read_rope(read, decoder["head_dim"]),
        )


class Llama(Decoder):
    """The causal language model."""

    def __init__(self, cfg: LlamaConfig, max_positions: int) -> None:
        bias = cfg.attention_bias
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=Attention(cfg, rotary_emb, qkv_bias=bias, out_bias=bias, window=cfg.sliding_window),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, "silu", cfg.mlp_bias),
            )
            for _ in range(cfg.num_hidden_layers)
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


LLAMA = Architecture(
    names=("LlamaForCausalLM",),
    read_config=LlamaConfig.read,
    build=Llama,
    gguf=GgufLayout(
        name="llama",
        tensors=GGUF_TENSORS,
        permuted=("q_proj", "k_proj"),
    ),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)
