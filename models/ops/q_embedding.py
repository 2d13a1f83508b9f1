"""Marker `QEmbedding`: rows of a table that is stored in blocks of small integers; see `blocks` for the formula."""

import torch
from torch import Tensor

from .blocks import dequantize


@torch.library.custom_op("zonda::q_embedding", mutates_args=())
def q_embedding(
    input_ids: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, block_size: int
) -> Tensor:
    """`dequantize(…)[input_ids]`; only the rows that are asked for are dequantised.

    Args:
        input_ids: (B, S) int64, in [0, V).
        codes: (V, H) uint8 for bits 8, (V, H/2) uint8 for bits 4 (see `blocks.pack`).
        scales: (V, H/block_size), floating.
        offsets: (V, H/block_size), floating, or None.
        bits: 4 or 8.
        block_size: weights that share a scale, along H.

    Returns:
        (B, S, H), dtype of scales.
    """
    rows = None if offsets is None else offsets[input_ids]
    return dequantize(codes[input_ids], scales[input_ids], rows, bits, block_size).to(scales.dtype)


@q_embedding.register_fake
def _(
    input_ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,  # noqa: ARG001
    bits: int,
    block_size: int,  # noqa: ARG001
) -> Tensor:
    return scales.new_empty(*input_ids.shape, codes.shape[1] * 8 // bits)
