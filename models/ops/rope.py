"""Marker `RoPE`: rotary position embedding of q and k (Su et al. 2021, arXiv:2104.09864, eq. 34).

Every token is rotated by the row of the tables at its own absolute position, so ragged batches and chunked
prefill need nothing else. Scalings (YaRN, llama3, …) live in the tables: see `models/rope.py`.
"""

import torch
from torch import Tensor

from .precision import widen


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    heads = widen(x).unflatten(-1, (num_heads, -1))  # (B, S, heads, D)
    half = cos.shape[-1]
    turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    c = cos[positions].unsqueeze(2).to(heads.dtype)  # (B, S, 1, R/2)
    s = sin[positions].unsqueeze(2).to(heads.dtype)
    pair = (first * c - second * s, second * c + first * s)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1).flatten(-2).to(x.dtype)


@torch.library.custom_op("zonda::rope", mutates_args=())
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    start_offsets_kernel: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate the first R of each head's D dimensions; the rest (partial rotary) passes through.

    Args:
        q: (B, S, Hq*D), floating.
        k: (B, S, Hkv*D), dtype of q.
        cos: (P, R/2), float32: cosine table, one row a position.
        sin: (P, R/2), float32.
        start_offsets_kernel: (B, S) int64, absolute position of every token, in [0, P).
        num_heads: Hq.
        num_key_value_heads: Hkv.
        interleaved: pairs are (0, 1), (2, 3), … instead of (0, R/2), (1, R/2 + 1), ….

    Returns:
        q (B, S, Hq*D) and k (B, S, Hkv*D), rotated.
    """
    return (
        _rotate(q, cos, sin, start_offsets_kernel, num_heads, interleaved),
        _rotate(k, cos, sin, start_offsets_kernel, num_key_value_heads, interleaved),
    )


@rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    start_offsets_kernel: Tensor,  # noqa: ARG001
    num_heads: int,  # noqa: ARG001
    num_key_value_heads: int,  # noqa: ARG001
    interleaved: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@torch.library.custom_op("zonda::rope_single", mutates_args=())
def rope_single(
    q: Tensor, cos: Tensor, sin: Tensor, start_offsets_kernel: Tensor, num_heads: int, interleaved: bool
) -> Tensor:
    """`rope` without a k (layers that read another layer's cache); the same ONNX marker with that input absent.

    Args and result: as q of `rope`.
    """
    return _rotate(q, cos, sin, start_offsets_kernel, num_heads, interleaved)


@rope_single.register_fake
def _(
    q: Tensor,
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    start_offsets_kernel: Tensor,  # noqa: ARG001
    num_heads: int,  # noqa: ARG001
    interleaved: bool,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(q)
