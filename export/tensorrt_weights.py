"""The weight file that TensorRT reads: every tensor in the type that the lowered graph declares, as TensorRT wants it.

Floats are rounded, unsigned codes become signed ones, and a table is dequantised. TensorRT refuses INT8 weights whose
scales are not positive (GGUF's may be negative, and 0 for a block of zeros), so such a block's codes change their sign.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .. import BuildError
from ..models.ops.blocks import dequantize
from .lower.tensorrt import Lowered
from .lower.tensorrt_weights import Blocks

Load = Callable[[str], Tensor]

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
_TABLE_ROWS = 1 << 12  # of a table that are dequantised at once


def stored_weights(lowered: Lowered, load: Load) -> Callable[[str], np.ndarray]:
    """A function: initialiser name -> its bytes in the file.

    Args:
        lowered: of `lower`.
        load: initialiser name of the universal graph -> tensor.

    Returns:
        The function; it raises BuildError if a value is too large for float16, or a block has no positive scale.
    """
    initialisers, weights = lowered.model.graph.initializers, lowered.weights

    @functools.lru_cache(maxsize=1)
    def matrix(blocks: Blocks) -> tuple[Tensor, Tensor]:
        rounded = _TORCH[_dtype(initialisers[blocks.scales])]
        return with_positive_scales(blocks, load(blocks.codes), load(blocks.scales), rounded)

    def read(name: str) -> np.ndarray:
        dtype = _dtype(initialisers[name])
        if name in weights.tables:
            return np.concatenate([as_typed(name, rows, dtype) for rows in _rows(weights.tables[name], load)])
        if name in weights.matrices:
            codes, scales = matrix(weights.matrices[name])
            return as_typed(name, codes if name == weights.matrices[name].codes else scales, dtype)
        return as_typed(name, load(name), dtype)

    return read


def as_typed(name: str, tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """The bytes of a tensor rounded to `dtype`; codes as they are, but for unsigned ones of 4 bits.

    Those mean `code - 8`, which as a signed number is the same bits with the highest turned over.

    Raises:
        BuildError: a value is too large for float16.
    """
    if tensor.is_floating_point() and dtype in _TORCH:
        narrow = tensor.to(_TORCH[dtype])
        if torch.isinf(narrow).any() and not torch.isinf(tensor).any():
            largest = tensor.abs().max().item()
            raise BuildError(f"{name} holds {largest:.3g}, more than float16 can: build with --dtype bf16")
        tensor = narrow
    elif dtype == ir.DataType.INT4:
        tensor = tensor ^ 0x88
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def with_positive_scales(blocks: Blocks, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Signed 8-bit codes and positive scales of the same numbers.

    Args:
        blocks: whose names and form they are.
        codes: (N, K) uint8, meaning `code - 128`.
        scales: (N, K / block_size) floating.
        dtype: to which the scales will be rounded; what becomes 0 is a block of zeros.

    Raises:
        BuildError: a code of -128 has a negative scale, so 128 would be needed.
    """
    signed = (codes ^ 0x80).view(torch.int8).reshape(len(codes), -1, blocks.form.block_size)
    rounded = scales.to(dtype)[..., None]
    if bool(((rounded < 0) & (signed == -128)).any()):
        raise BuildError(f"{blocks.codes} has a code of -128 with a negative scale, and TensorRT takes positive scales")
    signed = torch.where(rounded < 0, -signed, torch.where(rounded == 0, 0, signed)).to(torch.int8)
    return signed.flatten(-2), torch.where(rounded[..., 0] == 0, 1.0, scales.abs())


def _rows(table: Blocks, load: Load) -> Iterator[Tensor]:
    """A table (V, H) dequantised, some rows at a time."""
    codes, scales, form = load(table.codes), load(table.scales), table.form
    offsets = None if table.offsets is None else load(table.offsets)
    for start in range(0, len(codes), _TABLE_ROWS):
        part = slice(start, start + _TABLE_ROWS)
        some = None if offsets is None else offsets[part]
        yield dequantize(codes[part], scales[part], some, form.bits, form.block_size)


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise AssertionError(f"initialiser {value.name} has no type")
    return value.dtype
