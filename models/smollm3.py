"""SmolLM3: Llama without RoPE in every fourth layer (NoPE, Yang et al. 2025, arXiv:2501.18795)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import GGUF_TENSORS, Attention, Block, Decoder, GatedMlp
from .layers import ACTIVATIONS, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class SmolLM3Config(DecoderConfig):
    """rotates: whether each layer has RoPE. windows: each layer's attention window, 0 for the whole past."""

    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    rotates: tuple[bool, ...]
    windows: tuple[int, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "SmolLM3Config":
        """Read config.json as a mapping; raises `ConfigError` on what SmolLM3 does not compute."""
        read = ConfigReader(values)
        decoder = read_decoder(read, tie_word_embeddings=True)
        layers = decoder["num_hidden_layers"]
        interval = read.integer("no_rope_layer_interval", 4)
        by_interval = [int((layer + 1) % interval != 0) for layer in range(layers)]
        rotates = tuple(map(bool, read.integers("no_rope_layers", layers, by_interval)))
        window = read.integer_or_off("sliding_window", 0) if read.boolean("use_sliding_window", False) else 0
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=read.boolean("attention_bias", False),
            mlp_bias=read.boolean("mlp_bias", False),
            rotates=rotates,
            windows=read_windows(read, window, [bool(window) and not turns for turns in rotates]),
            rope=read_rope(read, decoder["head_dim"], theta=2e6),
        )


class SmolLM3(Decoder):
    """The causal language model."""

    def __init__(self, cfg: SmolLM3Config, max_positions: int) -> None:
        bias = cfg.attention_bias
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=Attention(cfg, rotary_emb if rotates else None, qkv_bias=bias, out_bias=bias, window=window),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias),
            )
            for rotates, window in zip(cfg.rotates, cfg.windows, strict=True)
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


SMOLLM3 = Architecture(
    names=("SmolLM3ForCausalLM",),
    read_config=SmolLM3Config.read,
    build=SmolLM3,
    gguf=GgufLayout(name="smollm3", tensors=GGUF_TENSORS, permuted=("q_proj", "k_proj")),
)
