"""StarCoder 2: LayerNorm, biases, an MLP without a gate, and a window in every layer if the configuration sets one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Block, Decoder
from .layers import ACTIVATIONS, LayerNorm, Linear, RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Starcoder2Config(DecoderConfig):
    """sliding_window: of every layer's attention, 0 for the whole past."""

    norm_epsilon: float
    hidden_act: str
    use_bias: bool
    sliding_window: int
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Starcoder2Config":
        """Read config.json as a mapping; raises `ConfigError` on what StarCoder 2 does not compute."""
        read = ConfigReader(values)
        read.choice("norm_type", ("layer_norm",), "layer_norm")
        read.choice("mlp_type", ("default",), "default")
        decoder = read_decoder(read, tie_word_embeddings=True)
        return cls(
            **decoder,
            norm_epsilon=read.number("norm_epsilon", 1e-5),
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            use_bias=read.boolean("use_bias", True),
            sliding_window=read.integer_or_off("sliding_window", 0),
            rope=read_rope(read, decoder["head_dim"]),
        )


class Starcoder2Mlp(nn.Module):
    """Two linears around an activation."""

    def __init__(self, cfg: Starcoder2Config) -> None:
        super().__init__()
        self.c_fc = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.use_bias)
        self.c_proj = Linear(cfg.intermediate_size, cfg.hidden_size, cfg.use_bias)
        self.act = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.c_proj(self.act(self.c_fc(x)))


class Starcoder2(Decoder):
    """The causal language model."""

    def __init__(self, cfg: Starcoder2Config, max_positions: int) -> None:
        bias, window = cfg.use_bias, cfg.sliding_window
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=LayerNorm(cfg.hidden_size, cfg.norm_epsilon),
                self_attn=Attention(cfg, rotary_emb, qkv_bias=bias, out_bias=bias, window=window),
                post_attention_layernorm=LayerNorm(cfg.hidden_size, cfg.norm_epsilon),
                mlp=Starcoder2Mlp(cfg),
            )
            for _ in range(cfg.num_hidden_layers)
        ]
        super().__init__(cfg, layers, LayerNorm(cfg.hidden_size, cfg.norm_epsilon))


STARCODER2 = Architecture(
    names=("Starcoder2ForCausalLM",),
    read_config=Starcoder2Config.read,
    build=Starcoder2,
    gguf=GgufLayout(
        name="starcoder2",
        tensors={
            **GGUF_TENSORS,
            "blk.{}.ffn_up": "model.layers.{}.mlp.c_fc",
            "blk.{}.ffn_down": "model.layers.{}.mlp.c_proj",
        },
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        config=lambda facts: {"hidden_act": "gelu_pytorch_tanh", "use_bias": facts.config["attention_bias"]},
    ),
)
