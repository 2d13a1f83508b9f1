"""The layers that a model file is written with: the fused types of the guide, each a thin module over a marker.

Parameters are allocated but never initialised: weights come from a checkpoint, and a model is usually built
under `torch.device("meta")`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .rope import RopeTables

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""HF's names of activation functions."""


class RmsNorm(nn.Module):
    """RMS normalisation over the last dimension; weight (H,)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return ops.rms_norm(x, self.weight, self.eps)


class QRmsNorm(nn.Module):
    """`RmsNorm` with a gain quantised in blocks: codes (H/block, block) int8, scales (H/block,)."""

    codes: Tensor
    scales: Tensor

    def __init__(self, hidden_size: int, eps: float, block_size: int = 32) -> None:
        super().__init__()
        self.eps = eps
        blocks = hidden_size // block_size
        self.register_buffer("codes", torch.empty(blocks, block_size, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return ops.q_rms_norm(x, self.codes, self.scales, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016, arXiv:1607.06450); weight and bias (H,)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(nn.Module):
    """`x @ weight.T + bias`; weight (N, K) as checkpoints store it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.weight, self.bias)


class QLinear(nn.Module):
    """`Linear` with a block-quantised weight; see `ops.q_linear` for codes, scales and offsets."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, block_size: int, *, offsets: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.bits = bits
        self.block_size = block_size
        codes = (
            torch.empty(out_features, in_features, dtype=torch.int8)
            if bits == 8
            else torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        )
        blocks = in_features // block_size
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(out_features, blocks))
        self.register_buffer("offsets", torch.empty(out_features, blocks) if offsets else None)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = ops.q_linear(x, self.codes, self.scales, self.offsets, self.bits, self.block_size)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Token embedding; weight (V, H)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        return F.embedding(input_ids, self.weight)


class RotaryEmbedding(nn.Module):
    """RoPE of q and k at the tokens' absolute positions; holds the tables cos and sin (P, R/2), float32."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, tables: RopeTables, num_heads: int, num_key_value_heads: int, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.interleaved = interleaved
        self.register_buffer("cos", tables.cos, persistent=False)
        self.register_buffer("sin", tables.sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, start_offsets_kernel: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, S, Hq*D), k (B, S, Hkv*D), positions (B, S) int64 -> both rotated."""
        heads = self.num_heads, self.num_key_value_heads
        return ops.rope(q, k, self.cos, self.sin, start_offsets_kernel, *heads, self.interleaved)


def gather_tokens(x: Tensor, logit_positions: Tensor) -> Tensor:
    """Pick the tokens that want logits: x (B, S, H), logit_positions (B, K) int64 in [0, S) -> (B, K, H)."""
    return x.gather(1, logit_positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def softcap(x: Tensor, cap: float) -> Tensor:
    """Bend `x` smoothly into (-cap, cap): `cap * tanh(x / cap)` (Gemma 2, arXiv:2408.00118, section 2)."""
    return torch.tanh(x / cap) * cap
