"""The parts of a decoder that most families share, and the skeleton that holds them together.

A family composes them in its own file, where its checkpoint's keys stand beside the modules, and overrides what it does
otherwise. Nothing here asks which family it serves.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from . import ops
from .architecture import CausalModel
from .cache import Cache, KvShape, LayerCache
from .config import DecoderConfig
from .layers import ACTIVATIONS, Embedding, Experts, Linear, RotaryEmbedding, gather_tokens

GGUF_TENSORS: Mapping[str, str] = {
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
}
"""How llama.cpp names the modules of this file, as `GgufLayout` wants it."""


class CachedAttention(nn.Module):
    """What attention does between its projections: rotate, write into the layer's cache, attend.

    rotary_emb: None for a layer without RoPE.
    scale: factor of q·k; 1/sqrt(head_dim) if it is None.
    window, softcap: see `ops.cached_attention`; 0 is off.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        rotary_emb: RotaryEmbedding | None,
        *,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = cfg.num_attention_heads
        self.rotary_emb = rotary_emb
        self.scale = cfg.head_dim**-0.5 if scale is None else scale
        self.window = window
        self.softcap = softcap

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seqlen_offsets: Tensor,
        start_offsets_kernel: Tensor,
        kv_cache: LayerCache,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q (B, S, Hq*D), k and v (B, S, Hkv*D) -> (B, S, Hq*D)."""
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q, k, start_offsets_kernel)
        keys, values = kv_cache.update(k, v, seqlen_offsets)
        return ops.cached_attention(
            q, keys, values, start_offsets_kernel, sinks, self.num_heads, self.scale, self.window, self.softcap
        )


class Attention(CachedAttention):
    """Grouped-query attention with the usual projections; a family that does more to q, k, v overrides `project`."""

    def __init__(
        self,
        cfg: DecoderConfig,
        rotary_emb: RotaryEmbedding | None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(cfg, rotary_emb, scale=scale, window=window, softcap=softcap)
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size, qkv_bias)
        self.k_proj = Linear(cfg.hidden_size, kv_size, qkv_bias)
        self.v_proj = Linear(cfg.hidden_size, kv_size, qkv_bias)
        self.o_proj = Linear(q_size, cfg.hidden_size, out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) -> q (B, S, Hq*D), k and v (B, S, Hkv*D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.o_proj(self.attend(*self.project(x), seqlen_offsets, start_offsets_kernel, kv_cache))


class QkNormAttention(Attention):
    """`Attention` with a norm over each head of q and of k in front of RoPE (Henry et al. 2020, arXiv:2010.04245)."""

    def __init__(
        self,
        cfg: DecoderConfig,
        rotary_emb: RotaryEmbedding | None,
        *,
        q_norm: nn.Module,
        k_norm: nn.Module,
        bias: bool = False,
        scale: float | None = None,
        window: int = 0,
    ) -> None:
        super().__init__(cfg, rotary_emb, qkv_bias=bias, out_bias=bias, scale=scale, window=window)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.head_dim = cfg.head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) -> q (B, S, Hq*D), k and v (B, S, Hkv*D)."""
        q, k, v = super().project(x)
        heads = (-1, self.head_dim)
        return self.q_norm(q.unflatten(-1, heads)).flatten(-2), self.k_norm(k.unflatten(-1, heads)).flatten(-2), v


class GatedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202): SwiGLU with silu, GeGLU with gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self.act_fn = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    """Mixture of experts; the linear `gate` scores them for each token."""

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, experts.down_proj.shape[0])
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.experts(x, self.gate(x))


class Block(nn.Module):
    """Pre-norm transformer block; made of modules, which keep the names they are passed under."""

    def __init__(
        self,
        *,
        input_layernorm: nn.Module,
        self_attn: nn.Module,
        post_attention_layernorm: nn.Module,
        mlp: nn.Module,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        x = x + self.self_attn(self.input_layernorm(x), seqlen_offsets, start_offsets_kernel, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelBlock(nn.Module):
    """Transformer block whose attention and MLP read the same norm (Wang & Komatsuzaki 2021, GPT-J)."""

    def __init__(self, *, input_layernorm: nn.Module, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.mlp = mlp

    def forward(self, x: Tensor, seqlen_offsets: Tensor, start_offsets_kernel: Tensor, kv_cache: LayerCache) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        normed = self.input_layernorm(x)
        return x + self.self_attn(normed, seqlen_offsets, start_offsets_kernel, kv_cache) + self.mlp(normed)


class Stack(nn.Module):
    """Everything under the checkpoint's prefix `model.`."""

    def __init__(self, cfg: DecoderConfig, layers: Iterable[nn.Module], norm: nn.Module, norm_name: str) -> None:
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.add_module(norm_name, norm)


class Decoder(CausalModel):
    """Embedding, blocks, final norm, head; a family overrides `embed` or `head` where it does more.

    norm_name: what the checkpoint calls the final norm.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        *,
        norm_name: str = "norm",
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm_name = norm_name
        self.model = Stack(cfg, layers, norm, norm_name)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, head_bias)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.kv_shapes = [KvShape(cfg.num_key_value_heads, cfg.head_dim, cfg.head_dim)] * cfg.num_hidden_layers

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        return self.model.embed_tokens(input_ids)

    def head(self, x: Tensor) -> Tensor:
        """(B, K, H) -> logits (B, K, V)."""
        return self.lm_head(self.model.get_submodule(self.norm_name)(x))

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
        x = self.embed(input_ids)
        for layer, block in enumerate(self.model.layers):
            x = block(x, seqlen_offsets, start_offsets_kernel, kv_cache[layer])
        return self.head(gather_tokens(x, logit_positions))
