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
from .quantization import Form
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

    def __init__(self, hidden_size: int, eps: float, block_size: int = 32) -> None:
        super().__init__()
        self.eps = eps
        self.form = Form(8, block_size, offsets=False)
        self.shape = (hidden_size,)
        blocks = hidden_size // block_size
        self.codes = nn.Parameter(torch.empty(blocks, block_size, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(blocks), requires_grad=False)

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


class BlockQuantizedWeight(nn.Module):
    """What `QLinear` and `QEmbedding` hold in place of a `weight` (N, K): its codes, scales and offsets.

    codes (N, K * bits / 8) uint8, scales (N, K / block_size), offsets like scales or None: see `BlockQuantized`.
    """

    def __init__(self, rows: int, columns: int, form: Form) -> None:
        super().__init__()
        self.form = form
        blocks = columns // form.block_size
        codes = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows, blocks), requires_grad=False)
        self.offsets = nn.Parameter(torch.empty(rows, blocks), requires_grad=False) if form.offsets else None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.form.bits


class QLinear(BlockQuantizedWeight):
    """`Linear` with a block-quantised weight; see `ops.q_linear`."""

    def __init__(self, in_features: int, out_features: int, form: Form, bias: bool = False) -> None:
        super().__init__(out_features, in_features, form)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = ops.q_linear(x, self.codes, self.scales, self.offsets, self.form.bits, self.form.block_size)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Token embedding; weight (V, H)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        return F.embedding(input_ids, self.weight)


class QEmbedding(BlockQuantizedWeight):
    """`Embedding` with a block-quantised table; see `ops.q_embedding`."""

    def __init__(self, vocab_size: int, hidden_size: int, form: Form) -> None:
        super().__init__(vocab_size, hidden_size, form)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, H)."""
        return ops.q_embedding(input_ids, self.codes, self.scales, self.offsets, self.form.bits, self.form.block_size)


class Experts(nn.Module):
    """Gated experts: gate_up_proj (E, 2*I, H), rows of gate and up in turn, down_proj (E, H, I), and biases if any.

    Checkpoints have other forms; see `stacking.py`. alpha, beta, limit: see `ops.moe`; the defaults are SwiGLU.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        top_k: int,
        normalize: bool,
        bias: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float = 0.0,
    ) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape), requires_grad=False)

        self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(2 * intermediate_size) if bias else None
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.top_k = top_k
        self.normalize = normalize
        self.swiglu = (alpha, beta, limit)

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """x (B, S, H), router_logits (B, S, E) -> (B, S, H)."""
        weights = (self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias)
        return ops.moe(x, router_logits, *weights, self.top_k, self.normalize, *self.swiglu)


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
