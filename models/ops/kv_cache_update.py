"""Marker `KvCacheUpdate`: write this call's keys (or values) into each row of a cache, at that row's offset."""

import torch
from torch import Tensor


@torch.library.custom_op("zonda::kv_cache_update", mutates_args=())
def kv_cache_update(cache: Tensor, new: Tensor, seqlen_offsets: Tensor) -> Tensor:
    """`cache[b, :, seqlen_offsets[b] : seqlen_offsets[b] + S] = new[b]`, as a new tensor; engines do it in place.

    Padding is written too: it lies beyond the row's valid length, and the next call overwrites it.

    Args:
        cache: (B, Hkv, C, D), floating.
        new: (B, S, Hkv*D), dtype of cache.
        seqlen_offsets: (B,) int32, tokens already cached in each row; seqlen_offsets[b] + S <= C.

    Returns:
        (B, Hkv, C, D).

    Raises:
        IndexError: a row would be written beyond C.
    """
    heads = new.unflatten(-1, (cache.shape[1], -1)).transpose(1, 2)  # (B, Hkv, S, D)
    steps = torch.arange(heads.shape[2], device=new.device)
    index = seqlen_offsets.long()[:, None] + steps  # (B, S)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= cache.shape[2]):
        raise IndexError(f"tokens at {int(index.min())}..{int(index.max())} do not fit a cache of {cache.shape[2]}")
    return cache.scatter(2, index[:, None, :, None].expand_as(heads), heads)


@kv_cache_update.register_fake
def _(cache: Tensor, new: Tensor, seqlen_offsets: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(cache)
