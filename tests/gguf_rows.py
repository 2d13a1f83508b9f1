"""Rows of GGUF blocks: any bits with chosen scales, and weights of a chosen spread, for every type that gguf reads."""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import NVFP4, dequantize, quantize

KINDS = [
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
    *(Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4, Type.NVFP4),
]
"""Those that have a form."""
FORMLESS = [
    *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.TQ1_0, Type.TQ2_0)
]
SYMMETRIC = [kind for kind in KINDS if kind not in (Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K)]
EXTREMES = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 1 / 3, -1, 1, 65504, -65504], np.float16)
"""Zeros, the smallest subnormal and normal, ordinary numbers, the largest."""

_WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
"""Types that gguf can write."""
_FP16_AT = {
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
    Type.TQ1_0: (52,),
    Type.TQ2_0: (64,),
    **dict.fromkeys((Type.MXFP4, Type.NVFP4, Type.IQ1_M), ()),  # their scales are no fp16, or scattered
}
"""Where the scale lies, and then the minimum; at the front if nothing is said."""
_CENTRE = {Type.Q2_K: 1.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}  # the factor of the minima that centres codes


def random_blocks(kind: Type, count: int, seed: int, numbers: np.ndarray = EXTREMES) -> np.ndarray:
    """(count, bytes a block) uint8: every bit random, but fp16 scales and minima drawn from `numbers`."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), np.uint8)
    for start in _FP16_AT.get(kind, (0,)):
        blocks[:, start : start + 2] = random.choice(numbers, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] %= 252  # 12 · 2^125 is the largest that float32 holds
    if kind == Type.IQ1_M:
        scales = blocks[:, 48:56].view("<u2")  # the highest four bits of each are four of the scale's
        halves = random.choice(numbers, (count, 1)).astype(np.float16).view(np.uint16)
        scales[:] = scales & 0xFFF | halves >> np.array([0, 4, 8, 12], np.uint16) << 12
    return blocks


def weight_rows(kind: Type, rows: int, columns: int, deviation: float, seed: int) -> np.ndarray:
    """(rows, bytes a row) uint8 of weights with this standard deviation; random ones of a type that gguf cannot write."""
    if kind.name in _WRITTEN:
        normal = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
        return quantize(normal * np.float32(deviation), kind)
    count = rows * columns // GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind, count, seed, np.ones(1))
    if kind in _CENTRE:
        start = _FP16_AT[kind][1]
        blocks[:, start : start + 2] = np.float16([_CENTRE[kind]]).view(np.uint8)
    factor = np.float32(deviation / dequantize(blocks, kind).std())
    if kind == Type.IQ1_M:
        return random_blocks(kind, count, seed, np.array([factor])).reshape(rows, -1)
    if kind == Type.NVFP4:
        codes = np.array(NVFP4.kvalues, np.float32)
        blocks[:, :4] = NVFP4.fp32_to_ue4m3(np.float32([2 * deviation / codes.std()]))
    for start in _FP16_AT.get(kind, (0,)):
        field = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)
        blocks[:, start : start + 2] = (field * factor).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
