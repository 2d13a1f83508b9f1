"""Rows of GGUF blocks: any bits with chosen fp16 numbers, and weights of a chosen spread, for all types with a form."""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

KINDS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
SYMMETRIC = [Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.Q6_K]
EXTREMES = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 1 / 3, -1, 1, 65504, -65504], np.float16)
"""Zeros, the smallest subnormal and normal, ordinary numbers, the largest."""

_FP16_AT = {Type.Q6_K: (208,), Type.Q4_0: (0,), Type.Q5_0: (0,), Type.Q8_0: (0,)}
_CENTRE = {Type.Q4_K: 7.5, Type.Q5_K: 15.5}  # the factor of the minima that centres codes of 4 and 5 bits


def random_blocks(kind: Type, count: int, seed: int, numbers: np.ndarray = EXTREMES) -> np.ndarray:
    """(count, bytes a block) uint8: every bit random, but fp16 scales and minima drawn from `numbers`."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), np.uint8)
    for start in _FP16_AT.get(kind, (0, 2)):
        blocks[:, start : start + 2] = random.choice(numbers, (count, 1)).astype(np.float16).view(np.uint8)
    return blocks


def weight_rows(kind: Type, rows: int, columns: int, deviation: float, seed: int) -> np.ndarray:
    """(rows, bytes a row) uint8 of weights with this standard deviation; gguf cannot write K types, so theirs are random."""
    if not kind.name.endswith("_K"):
        normal = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
        return quantize(normal * np.float32(deviation), kind)
    blocks = random_blocks(kind, rows * columns // 256, seed, np.ones(1))
    if kind in _CENTRE:
        blocks[:, 2:4] = np.float16([_CENTRE[kind]]).view(np.uint8)
    factor = np.float32(deviation / dequantize(blocks, kind).std())
    for start in _FP16_AT.get(kind, (0, 2)):
        field = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)
        blocks[:, start : start + 2] = (field * factor).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
