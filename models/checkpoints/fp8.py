"""Weights of 8-bit floats (e4m3) with scales: per tensor, per output, or per block of outputs and inputs.

`w[n, k] = stored[n, k] * scale[n // block_n, k // block_k]`. DeepSeek's `weight_scale_inv` is that same factor: the
inverse of what the weight was multiplied with. Activations, which some of these methods quantise too, stay floats.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import CheckpointError
from ..config import ConfigReader
from .base import Checkpoint, TensorInfo
from .packed import Packed

_SCALES = ("weight_scale", "weight_scale_inv")
_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 20  # weights dequantised at a time: the peak is the tensor and a little

Block = tuple[int, int]


def read_fp8(checkpoint: Checkpoint, read: ConfigReader) -> Packed:
    """`fp8`, with `weight_block_size` (DeepSeek, Qwen) or without, and `fbgemm_fp8`.

    Raises:
        ConfigError: an option is not supported.
        CheckpointError: a weight has no scale, or one that does not fit it.
    """
    read.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    return _read(checkpoint, [_block(read, "weight_block_size")] if read.has("weight_block_size") else [])


def read_compressed_tensors(checkpoint: Checkpoint, read: ConfigReader) -> Packed:
    """`compressed-tensors` of the format `float-quantized`.

    Raises:
        ConfigError: another format, or weights of another kind.
        CheckpointError: as of `read_fp8`.
    """
    read.choice("format", ("float-quantized",))
    read.choice("quantization_status", ("compressed", "frozen"), "compressed")
    read.section("sparsity_config").choice("format", ("dense",), "dense")
    blocks = []
    groups = read.section("config_groups")
    for name in groups.names():
        weights = groups.section(name).section("weights")
        weights.choice("type", ("float",))
        weights.integer("num_bits", minimum=8, maximum=8)
        if not weights.boolean("symmetric", True):
            raise weights.error("symmetric false is not supported: 8-bit floats have no zero point here")
        if weights.choice("strategy", ("tensor", "channel", "block")) == "block":
            blocks.append(_block(weights, "block_structure"))
    return _read(checkpoint, blocks)


def _block(read: ConfigReader, key: str) -> Block:
    rows, columns = read.integers(key, 2, ())
    if not rows or not columns:
        raise read.error(f"{key} must be two integers of at least 1, found {[rows, columns]}")
    return rows, columns


def _read(checkpoint: Checkpoint, blocks: Sequence[Block]) -> Packed:
    weights = {
        name: Fp8Weight(checkpoint, name, blocks)
        for name, info in checkpoint.tensors.items()
        if info.dtype == torch.float8_e4m3fn
    }
    if not weights:
        raise CheckpointError(f"{checkpoint.source.name}: config.json says 8-bit floats, but no tensor has them")
    unused = tuple(name for name in checkpoint.tensors if name.rpartition(".")[2] in _ACTIVATIONS)
    return Packed(weights, unused)


class Fp8Weight:
    """See `PackedWeight`."""

    def __init__(self, checkpoint: Checkpoint, name: str, blocks: Sequence[Block]) -> None:
        self._checkpoint = checkpoint
        self._name = name
        shape = checkpoint.tensors[name].shape
        prefix = name.removesuffix("weight")
        scales = [prefix + part for part in _SCALES if prefix + part in checkpoint.tensors]
        if len(shape) != 2 or prefix == name or len(scales) != 1:
            raise self._error(f"of shape {list(shape)} must be a matrix called weight with one scale beside it")
        self._scale = scales[0]
        self._block, self._grid = self._fit(shape, checkpoint.tensors[self._scale], blocks)
        self.info = TensorInfo(shape, torch.float32, "FP8 E4M3 scaled")
        self.sources: tuple[str, ...] = (name, self._scale)

    def load(self) -> Tensor:
        """See `PackedWeight`; one rounding to float32, that of the product."""
        rows, columns = self.info.shape
        scale = self._checkpoint.load(self._scale).float().reshape(self._grid)
        if not scale.isfinite().all():
            raise self._error(f"has a {self._scale} that is not a finite number; download it again")
        stored = self._checkpoint.load(self._name)
        weight = torch.empty(rows, columns)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = torch.arange(start, min(start + step, rows))
            factors = scale[part // self._block[0]].repeat_interleave(self._block[1], 1)[:, :columns]
            weight[part] = stored[start : start + step].float() * factors
        return weight

    def blocks(self) -> None:
        """See `PackedWeight`; 8-bit floats are no codes."""
        return

    def _fit(self, shape: tuple[int, ...], scale: TensorInfo, blocks: Sequence[Block]) -> tuple[Block, Block]:
        """The size of the blocks that the scale's shape says, and how many there are along each side."""
        rows, columns = shape
        if 0 in shape or scale.dtype not in _FLOATS:
            raise self._error(f"has shape {list(shape)} and a {self._scale} stored as {scale.stored}")
        if math.prod(scale.shape) == 1:
            return (rows, columns), (1, 1)
        if scale.shape in ((rows,), (rows, 1)):
            return (1, columns), (rows, 1)
        for block in blocks:
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            if scale.shape == grid:
                return (min(block[0], rows), min(block[1], columns)), grid
        fitting = ", ".join(map(str, ["a tensor", "a row", *(f"a block of {a} × {b}" for a, b in blocks)]))
        raise self._error(
            f"of shape {list(shape)} has a {self._scale} of shape {list(scale.shape)}, which is no scale for {fitting}"
        )

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.source.name}: {self._name} {message}")
