"""Gemma: Llama's block with GeGLU, a scaled embedding, and norms whose weights are offsets to 1."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import ops
from .architecture import Architecture, GgufLayout
from .config import ConfigReader, DecoderConfig, read_decoder
from .decoder import GGUF_TENSORS, Attention, Block, Decoder, GatedMlp
from .layers import RmsNorm, RotaryEmbedding, softcap
from .rope import RopeConfig, read_rope

GELU = "gelu_pytorch_tanh"
GGUF_CONFIG = {"hidden_act": GELU, "norm_offset": 0.0}
"""What Gemma's GGUFs have in common: llama.cpp stores the norms with the 1 already added."""


@dataclass(frozen=True, slots=True)
class GemmaConfig(DecoderConfig):
    """norm_offset: what is added to norm weights; 1, or 0 if the file's weights hold it (a key of ours, not HF's)."""

    rms_norm_eps: float
    norm_offset: float
    attention_bias: bool
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "GemmaConfig":
        """Read config.json as a mapping; raises `ConfigError` on what Gemma does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_act", (GELU, "gelu"), GELU)  # old files say gelu and mean its tanh form
        read.refuse("use_bidirectional_attention", "attention is causal here")
        decoder = read_decoder(read, tie_word_embeddings=True)
        return cls(
            **decoder,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            norm_offset=read.number("norm_offset", 1.0, positive=False),
            attention_bias=read.boolean("attention_bias", False),
            rope=read_rope(read, decoder["head_dim"]),
        )


class OffsetRmsNorm(RmsNorm):
    """`RmsNorm` whose gain is offset + weight."""

    def __init__(self, hidden_size: int, eps: float, offset: float) -> None:
        super().__init__(hidden_size, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        gain = self.weight + self.offset if self.offset else self.weight
        return ops.rms_norm(x, gain, self.eps)


class GemmaDecoder(Decoder):
    """The frame of Gemma 1, 2 and 3: the embedding is scaled by the root of its width, logits are capped from 2 on."""

    final_logit_softcapping = 0.0

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        x = super().embed(input_ids)
        return x * math.sqrt(x.shape[-1])

    def head(self, x: Tensor) -> Tensor:
        """(B, K, H) -> logits (B, K, V)."""
        logits = super().head(x)
        return softcap(logits, self.final_logit_softcapping) if self.final_logit_softcapping else logits


class Gemma(GemmaDecoder):
    """The causal language model."""

    def __init__(self, cfg: GemmaConfig, max_positions: int) -> None:
        bias, norm = cfg.attention_bias, (cfg.hidden_size, cfg.rms_norm_eps, cfg.norm_offset)
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        layers = [
            Block(
                input_layernorm=OffsetRmsNorm(*norm),
                self_attn=Attention(cfg, rotary_emb, qkv_bias=bias, out_bias=bias),
                post_attention_layernorm=OffsetRmsNorm(*norm),
                mlp=GatedMlp(cfg.hidden_size, cfg.intermediate_size, GELU),
            )
            for _ in range(cfg.num_hidden_layers)
        ]
        super().__init__(cfg, layers, OffsetRmsNorm(*norm))


GEMMA = Architecture(
    names=("GemmaForCausalLM",),
    read_config=GemmaConfig.read,
    build=Gemma,
    gguf=GgufLayout(name="gemma", tensors=GGUF_TENSORS, config=lambda _: dict(GGUF_CONFIG)),
)
