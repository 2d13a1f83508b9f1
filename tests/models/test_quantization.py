"""Every GGUF block type as codes, scales and offsets: held to the gguf package's dequantisation."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf_rows import EXTREMES, KINDS, SYMMETRIC, random_blocks, weight_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from zonda.models.checkpoints.gguf_blocks import form_of, read_rows
from zonda.models.ops.blocks import pack, unpack
from zonda.models.quantization import BlockQuantized, Form

ROUNDING = 2.0**-24  # of a float32 operation, relative


def read(rows: np.ndarray, kind: Type) -> BlockQuantized:
    codes, scales, offsets = read_rows(rows, kind)
    form = form_of(kind)
    parts = (None if part is None else torch.from_numpy(part) for part in (codes, scales, offsets))
    return BlockQuantized(form.bits, form.block_size, *parts)


def names(kind: Type) -> str:
    return kind.name


FORMS = {
    Type.Q4_0: Form(4, 32, offsets=False),
    Type.Q4_1: Form(4, 32, offsets=True),
    Type.Q5_0: Form(8, 32, offsets=False),
    Type.Q5_1: Form(8, 32, offsets=True),
    Type.Q8_0: Form(8, 32, offsets=False),
    Type.Q4_K: Form(4, 32, offsets=True),
    Type.Q5_K: Form(8, 32, offsets=True),
    Type.Q6_K: Form(8, 16, offsets=False),
    Type.Q2_K: Form(4, 16, offsets=True),
    Type.Q3_K: Form(4, 16, offsets=False),
    Type.IQ4_NL: Form(8, 32, offsets=False),
    Type.IQ4_XS: Form(8, 32, offsets=False),
    Type.MXFP4: Form(8, 32, offsets=False),
    Type.NVFP4: Form(8, 16, offsets=False),
}


@pytest.mark.parametrize("kind", Type, ids=names)
def test_these_types_have_a_form_and_no_other_has(kind):
    assert form_of(kind) == FORMS.get(kind)


@pytest.mark.parametrize("numbers", [EXTREMES, np.float16([0.0123, -0.7, 3.1])], ids=["extreme", "ordinary"])
@pytest.mark.parametrize("kind", SYMMETRIC, ids=names)
def test_types_without_a_minimum_are_the_same_floats(kind, numbers):
    blocks = random_blocks(kind, 400, seed=1, numbers=numbers)
    wanted = torch.from_numpy(dequantize(blocks, kind))
    assert torch.equal(read(blocks, kind).dequantize(), wanted)


@pytest.mark.parametrize("numbers", [EXTREMES, np.float16([0.0123, -0.7, 3.1])], ids=["extreme", "ordinary"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in SYMMETRIC], ids=names)
def test_types_with_a_minimum_are_off_by_rounding_alone(kind, numbers):
    """d·q is exact in float32, so gguf rounds once, at d·q + m; here the offset is rounded once more."""
    blocks = random_blocks(kind, 400, seed=1, numbers=numbers)
    wanted = torch.from_numpy(dequantize(blocks, kind)).double()
    found = read(blocks, kind)
    offsets = found.offsets.double().repeat_interleave(found.block_size, 1)
    error = (found.dequantize().double() - wanted).abs()
    assert torch.all(error <= ROUNDING * (offsets.abs() + 2 * wanted.abs()) * 1.000001)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_weights_are_lossless_to_a_millionth_of_their_block(kind):
    rows = weight_rows(kind, 64, 512, deviation=0.05, seed=2)
    wanted = torch.from_numpy(dequantize(rows, kind)).double()
    error = (read(rows, kind).dequantize() - wanted).abs().unflatten(1, (-1, FORMS[kind].block_size))
    largest = wanted.abs().unflatten(1, (-1, FORMS[kind].block_size)).amax(-1, keepdim=True)
    assert torch.all(error <= 1e-6 * largest)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1], ids=names)
def test_blocks_whose_minimum_is_of_the_order_of_their_range_are_the_same_floats(kind):
    """As quantisers write them: then middle·d + m has no more than 24 bits, and nothing is rounded twice."""
    rows = weight_rows(kind, 64, 512, deviation=0.05, seed=2)
    assert torch.equal(read(rows, kind).dequantize(), torch.from_numpy(dequantize(rows, kind)))


@pytest.mark.parametrize("kind", KINDS, ids=names)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 9))
def test_shapes(kind, rows, blocks, seed):
    form, (block, _) = FORMS[kind], GGML_QUANT_SIZES[kind]
    raw = random_blocks(kind, rows * blocks, seed, np.float16([0.25])).reshape(rows, -1)
    found = read(raw, kind)
    columns = blocks * block
    assert found.shape == (rows, columns)
    assert found.form == form
    assert found.codes.shape == (rows, columns * form.bits // 8)
    assert found.codes.dtype == torch.uint8
    assert found.scales.shape == (rows, columns // form.block_size)
    assert found.scales.dtype == torch.float32
    assert (found.offsets is not None) == form.offsets
    assert found.offsets is None or found.offsets.shape == found.scales.shape
    torch.testing.assert_close(found.dequantize(), torch.from_numpy(dequantize(raw, kind)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q5_0, 5), (Type.Q5_1, 5), (Type.Q5_K, 5), (Type.Q6_K, 6)])
def test_five_and_six_bits_lie_around_the_zero_point_of_eight(kind, bits):
    codes = read(random_blocks(kind, 100, seed=3), kind).codes
    half = 2 ** (bits - 1)
    assert (codes.min().item(), codes.max().item()) == (128 - half, 128 + half - 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_puts_the_first_code_into_the_low_bits(bits):
    codes = torch.arange(12, dtype=torch.uint8).reshape(2, 6)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits), codes)
    if bits == 4:
        assert packed.tolist() == [[0x10, 0x32, 0x54], [0x76, 0x98, 0xBA]]
