"""Marker `CachedAttention`: softmax attention of new tokens over a cache that already holds them.

Causality is a comparison of positions and nothing else: key j of a row is visible to the token at position p
when j <= p (and j > p - window). Idle rows and padding need no case of their own.
"""

import torch
from torch import Tensor

from .precision import widen


@torch.library.custom_op("zonda::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    start_offsets_kernel: Tensor,
    sinks: Tensor | None,
    num_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over cached keys and values.

    Args:
        q: (B, S, Hq*D), floating.
        key_cache: (B, Hkv, C, D), dtype of q; Hq is a multiple of Hkv.
        value_cache: (B, Hkv, C, Dv), dtype of q.
        start_offsets_kernel: (B, S) int64, absolute position of every query.
        sinks: (Hq,) or None: a logit a head that takes part in the softmax and in nothing else.
        num_heads: Hq.
        scale: factor of q·k, 1/sqrt(D) in most models.
        window: a query sees this many positions, its own included; 0 is all.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0 is off.

    Returns:
        (B, S, Hq*Dv), dtype of q.
    """
    groups = num_heads // key_cache.shape[1]
    query = widen(q).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, Hq, S, D)
    key = widen(key_cache).repeat_interleave(groups, 1)  # (B, Hq, C, D)
    value = widen(value_cache).repeat_interleave(groups, 1)  # (B, Hq, C, Dv)
    logits = query @ key.transpose(-1, -2) * scale  # (B, Hq, S, C)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    slots = torch.arange(key.shape[2], device=q.device)
    positions = start_offsets_kernel[:, None, :, None]  # (B, 1, S, 1)
    visible = slots <= positions
    if window:
        visible &= slots > positions - window
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat((logits, column), -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2).to(q.dtype)


@cached_attention.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,  # noqa: ARG001
    value_cache: Tensor,
    start_offsets_kernel: Tensor,  # noqa: ARG001
    sinks: Tensor | None,  # noqa: ARG001
    num_heads: int,
    scale: float,  # noqa: ARG001
    window: int,  # noqa: ARG001
    softcap: float,  # noqa: ARG001
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], num_heads * value_cache.shape[3])
