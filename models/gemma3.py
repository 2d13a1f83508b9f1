"""Gemma 3, text: Gemma 2 with QK-norm for the attention's soft cap, and a RoPE of its own for windowed layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, GgufFacts, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder, read_windows
from .decoder import GatedMlp, QkNormAttention
from .gemma import GELU, GGUF_CONFIG, GemmaDecoder, OffsetRmsNorm
from .gemma2 import SANDWICH_TENSORS, SandwichBlock, gguf_query_scalar
from .layers import RotaryEmbedding
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Gemma3Config(DecoderConfig):
    """windows: each layer's attention window, 0 for the whole past, which is read with global_rope."""

    rms_norm_eps: float
    norm_offset: float
    attention_bias: bool
    query_pre_attn_scalar: float
    final_logit_softcapping: float
    windows: tuple[int, ...]
    global_rope: RopeConfig
    local_rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Gemma3Config":
        """Read config.json as a mapping; raises `ConfigError` on what Gemma 3 does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_activation", (GELU,), GELU)
        read.refuse("attn_logit_softcapping", "Gemma 3 has QK-norm instead")
        read.refuse("use_bidirectional_attention", "attention is causal here")
        decoder = read_decoder(read, tie_word_embeddings=True)
        pattern = read.integer("sliding_window_pattern", 6)
        sliding = [(layer + 1) % pattern != 0 for layer in range(decoder["num_hidden_layers"])]
        window = read.integer_or_off("sliding_window", 4096)
        global_rope, local_rope = _read_ropes(read, decoder["head_dim"])
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            norm_offset=read.number("norm_offset", 1.0, positive=False),
            attention_bias=read.boolean("attention_bias", False),
            query_pre_attn_scalar=read.number("query_pre_attn_scalar", 256),
            final_logit_softcapping=read.number_or_off("final_logit_softcapping", 0.0),
            windows=read_windows(read, window, sliding),
            global_rope=global_rope,
            local_rope=local_rope,
        )


def _read_ropes(read: ConfigReader, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """(global, local), of transformers 5's nested form or of 4's flat one, whose scaling is the global RoPE's."""
    if read.has("rope_parameters"):
        nested = read.section("rope_parameters")
        full, sliding = nested.section("full_attention"), nested.section("sliding_attention")
        return read_rope(read, head_dim, scaling=full, theta=1e6), read_rope(read, head_dim, scaling=sliding)
    local = ConfigReader({"rope_theta": read.number("rope_local_base_freq", 1e4)})
    return read_rope(read, head_dim, theta=1e6), read_rope(read, head_dim, scaling=local)


class Gemma3(GemmaDecoder):
    """The causal language model."""

    def __init__(self, cfg: Gemma3Config, max_positions: int) -> None:
        norm = (cfg.hidden_size, cfg.rms_norm_eps, cfg.norm_offset)
        head_norm = (cfg.head_dim, cfg.rms_norm_eps, cfg.norm_offset)
        heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
        global_rotary = RotaryEmbedding(cfg.global_rope.tables(max_positions), *heads)
        local_rotary = RotaryEmbedding(cfg.local_rope.tables(max_positions), *heads)
        layers = [
            SandwichBlock(
                input_layernorm=OffsetRmsNorm(*norm),
                self_attn=QkNormAttention(
                    cfg,
                    local_rotary if window else global_rotary,
                    q_norm=OffsetRmsNorm(*head_norm),
                    k_norm=OffsetRmsNorm(*head_norm),
                    bias=cfg.attention_bias,
                    scale=cfg.query_pre_attn_scalar**-0.5,
                    window=window,
                ),
                post_attention_layernorm=OffsetRmsNorm(*norm),
                pre_feedforward_layernorm=OffsetRmsNorm(*norm),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, GELU),
                post_feedforward_layernorm=OffsetRmsNorm(*norm),
            )
            for window in cfg.windows
        ]
        super().__init__(cfg, layers, OffsetRmsNorm(*norm))
        self.final_logit_softcapping = cfg.final_logit_softcapping


def _gguf_config(facts: GgufFacts) -> dict[str, Any]:
    keys = facts.keys
    names = {"attention.sliding_window_pattern": "sliding_window_pattern", "rope.freq_base_swa": "rope_local_base_freq"}
    config = {name: keys[key] for key, name in names.items() if key in keys}
    return {**GGUF_CONFIG, **config, "query_pre_attn_scalar": gguf_query_scalar(keys, 62)}


GEMMA3 = Architecture(
    names=("Gemma3ForCausalLM",),
    read_config=Gemma3Config.read,
    build=Gemma3,
    gguf=GgufLayout(
        name="gemma3",
        tensors={
            **SANDWICH_TENSORS,
            "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
            "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
        },
        config=_gguf_config,
    ),
)
