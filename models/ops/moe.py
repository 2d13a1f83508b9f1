"""Marker `MoE`: a mixture of gated experts, of which each token goes through the few that its router scores highest.

Grouped by expert: every expert that any token chose runs once, over its tokens; the others do not run at all. Tokens
do not see each other, so ragged batches and padding need no case of their own.
"""

import torch
from torch import Tensor

from .precision import widen


@torch.library.custom_op("zonda::moe", mutates_args=())
def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    top_k: int,
    normalize: bool,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """Sum `p_e * (down_e @ h_e + down_bias_e)` over the chosen experts e (Shazeer et al. 2017, arXiv:1701.06538).

    `h = g * sigmoid(alpha * g) * (u + beta)`, where g and u are the even and the odd rows of
    `gate_up_e @ x + gate_up_bias_e`: SwiGLU with alpha 1 and beta 0.

    Args:
        x: (B, S, H), floating.
        router_logits: (B, S, E), dtype of x.
        gate_up: (E, 2*I, H), dtype of x: rows of gate and up in turn.
        down: (E, H, I), dtype of x.
        gate_up_bias: (E, 2*I) or None.
        down_bias: (E, H) or None; both or neither.
        top_k: how many experts a token goes through.
        normalize: p is the softmax over the chosen experts' logits; else over all experts' logits.
        alpha: see above.
        beta: see above.
        limit: g is cut to at most this, u to between -limit and limit; 0 is off.

    Returns:
        (B, S, H), dtype of x.
    """
    tokens, logits = widen(x).flatten(0, 1), widen(router_logits).flatten(0, 1)  # (T, H), (T, E)
    chosen, ids = logits.topk(top_k, -1)  # (T, K)
    weights = chosen.softmax(-1) if normalize else logits.softmax(-1).gather(-1, ids)
    result = torch.zeros_like(tokens)
    for expert in ids.unique().tolist():
        rows, rank = torch.where(ids == expert)
        both = tokens[rows] @ gate_up[expert].to(tokens.dtype).T
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert].to(tokens.dtype)
        gate, up = both[:, 0::2], both[:, 1::2]
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out = (gate * torch.sigmoid(alpha * gate) * (up + beta)) @ down[expert].to(tokens.dtype).T
        if down_bias is not None:
            out = out + down_bias[expert].to(tokens.dtype)
        result.index_add_(0, rows, out * weights[rows, rank, None])
    return result.reshape(x.shape).to(x.dtype)


@moe.register_fake
def _(
    x: Tensor,
    router_logits: Tensor,  # noqa: ARG001
    gate_up: Tensor,  # noqa: ARG001
    down: Tensor,  # noqa: ARG001
    gate_up_bias: Tensor | None,  # noqa: ARG001
    down_bias: Tensor | None,  # noqa: ARG001
    top_k: int,  # noqa: ARG001
    normalize: bool,  # noqa: ARG001
    alpha: float,  # noqa: ARG001
    beta: float,  # noqa: ARG001
    limit: float,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(x)
