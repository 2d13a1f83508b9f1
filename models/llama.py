"""The Llama family: Llama, Mistral without a sliding window, SmolLM2.

Parameter names are the checkpoint's own (`model.layers.0.self_attn.q_proj.weight`), so no table of names is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .architecture import Architecture, CausalModel, GgufLayout
from .cache import Cache, KvShape, LayerCache
from .config import ConfigReader
from .layers import Embedding, Linear, RmsNorm, RotaryEmbedding, gather_tokens
from .rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What the family needs of a config.json; names are HF's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read config.json as a mapping; raises `ConfigError` on what this family does not compute."""
        read = ConfigReader(values)
        read.choice("hidden_act", ("silu",), "silu")
        read.refuse("sliding_window", "this model file has no windowed attention")
        read.refuse("quantization_config", "load the checkpoint in its float form")
        hidden_size = read.integer("hidden_size")
        heads = read.integer("num_attention_heads")
        if not read.has("head_dim") and hidden_size % heads:
            raise read.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        kv_heads = read.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise read.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = read.integer("head_dim", hidden_size // heads)
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            max_position_embeddings=read.integer("max_position_embeddings", 2048),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            attention_bias=read.boolean("attention_bias", False),
            mlp_bias=read.boolean("mlp_bias", False),
            rope=read_rope(read, head_dim),
        )


class Attention(nn.Module):
    """Grouped-query attention over a layer's cache."""

    def __init__(self, cfg: LlamaConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size, cfg.attention_bias)
        self.k_proj = Linear(cfg.hidden_size, kv_size, cfg.attention_bias)
        self.v_proj = Linear(cfg.hidden_size, kv_size, cfg.attention_bias)
        self.o_proj = Linear(q_size, cfg.hidden_size, cfg.attention_bias)
        self.num_heads = cfg.num_attention_heads
        self.scale = cfg.head_dim**-0.5
        self.rotary_emb = rotary_emb

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        q, k = self.rotary_emb(self.q_proj(x), self.k_proj(x), start_offsets_kernel)
        keys, values = kv_cache.update(k, self.v_proj(x), seqlen_offsets)
        attended = ops.cached_attention(
            q, keys, values, start_offsets_kernel, None, self.num_heads, self.scale, window=0, softcap=0.0
        )
        return self.o_proj(attended)


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: LlamaConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, rotary_emb)
        self.post_attention_layernorm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = Mlp(cfg)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        x = x + self.self_attn(self.input_layernorm(x), seqlen_offsets, start_offsets_kernel, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: everything under the checkpoint's prefix `model.`."""

    def __init__(self, cfg: LlamaConfig, max_positions: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        rotary_emb = RotaryEmbedding(cfg.rope.tables(max_positions), cfg.num_attention_heads, cfg.num_key_value_heads)
        self.layers = nn.ModuleList(Block(cfg, rotary_emb) for _ in range(cfg.num_hidden_layers))
        self.norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Llama(CausalModel):
    """The causal language model."""

    def __init__(self, cfg: LlamaConfig, max_positions: int) -> None:
        super().__init__()
        self.model = Decoder(cfg, max_positions)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.kv_shapes = [KvShape(cfg.num_key_value_heads, cfg.head_dim, cfg.head_dim)] * cfg.num_hidden_layers

    def forward(
        self,
        input_ids: Tensor,
        seqlen_offsets: Tensor,
        start_offsets_kernel: Tensor,
        input_lens: Tensor,  # noqa: ARG002
        logit_positions: Tensor,
        kv_cache: Cache,
    ) -> Tensor:
        """See `CausalModel`."""
        x = self.model.embed_tokens(input_ids)
        for layer, block in enumerate(self.model.layers):
            x = block(x, seqlen_offsets, start_offsets_kernel, kv_cache[layer])
        logits: Tensor = self.lm_head(self.model.norm(gather_tokens(x, logit_positions)))
        return logits


LLAMA = Architecture(
    names=("LlamaForCausalLM", "MistralForCausalLM"),
    read_config=LlamaConfig.read,
    build=Llama,
    gguf=GgufLayout(
        name="llama",
        tensors={
            "token_embd": "model.embed_tokens",
            "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
            "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
            "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
            "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
            "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
            "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
            "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
            "output_norm": "model.norm",
            "output": "lm_head",
        },
        permuted=("q_proj", "k_proj"),
    ),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)
