"""Qwen 2 and 2.5: Llama with biased q, k, v, and windows in the upper layers if the configuration asks for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import GGUF_TENSORS, Attention, Block, Decoder, GatedMlp
from .layers import ACTIVATIONS, RmsNorm, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Qwen2Config(DecoderConfig):
    """windows: each layer's attention window, 0 for the whole past."""

    rms_norm_eps: float
    hidden_act: str
    windows: tuple[int, ...]
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Qwen2Config":
        """Read config.json as a mapping; raises `ConfigError` on what Qwen 2 does not compute."""
        read = ConfigReader(values)
        decoder = read_decoder(read)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            windows=read_qwen_windows(read, decoder["num_hidden_layers"]),
            rope=read_rope(read, decoder["head_dim"]),
        )


def read_qwen_windows(read: ConfigReader, layers: int) -> tuple[int, ...]:
    """Each layer's window: layers from `max_window_layers` on slide, if `use_sliding_window`."""
    window = read.integer_or_off("sliding_window", 4096) if read.boolean("use_sliding_window", False) else 0
    first = read.integer("max_window_layers", 28, minimum=0) if window else layers
    return read_windows(read, window, [layer >= first for layer in range(layers)])


class Qwen2(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Qwen2Config, max_positions: int) -> None:
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                self_attn=Attention(cfg, rotary_emb, qkv_bias=True, window=window),
                post_attention_layernorm=RmsNorm(cfg.hidden_size, cfg.rms_norm_eps),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act),
            )
            for window in cfg.windows
        ]
        super().__init__(cfg, layers, RmsNorm(cfg.hidden_size, cfg.rms_norm_eps))


QWEN2 = Architecture(
    names=("Qwen2ForCausalLM",),
    read_config=Qwen2Config.read,
    build=Qwen2,
    gguf=GgufLayout(name="qwen2", tensors=GGUF_TENSORS),
)
