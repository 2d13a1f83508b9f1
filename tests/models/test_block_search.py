"""The search of scale and offset a block, held to rounding to nearest, to all assignments of codes, and to itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zonda.models.block_search import importance, quantize, relative_error
from zonda.models.quantization import BlockQuantized, Form

FORMS = [Form(bits, 32, offsets=offsets) for bits in (4, 8) for offsets in (True, False)]
INT4 = Form(4, 32, offsets=True)


def weights(rows: int, columns: int, seed: int, kind: str = "normal") -> torch.Tensor:
    random = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: random.standard_normal((rows, columns)) * 0.03,
        "heavy": lambda: random.standard_t(3, (rows, columns)),
        "lopsided": lambda: random.exponential(0.1, (rows, columns)) + 3,
        "outlier": lambda: np.where(random.random((rows, columns)) < 0.02, 5, 0.01) * random.standard_normal(columns),
    }[kind]()
    return torch.from_numpy(drawn.astype(np.float32))


def to_nearest(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """From the least to the largest of a block, or evenly around zero; float64."""
    x = weight.double().unflatten(-1, (-1, form.block_size))
    if form.offsets:
        low = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - low) / (2**form.bits - 1)
    else:
        low, scale = torch.zeros(()), x.abs().amax(-1, keepdim=True) / (2 ** (form.bits - 1) - 1)
    return (((x - low) / scale).round() * scale + low).flatten(-2)


def errors(weight: torch.Tensor, held: torch.Tensor, block_size: int) -> torch.Tensor:
    """The weighted square error of each block, float64."""
    left = importance(weight).double() * (weight.double() - held.double()).square()
    return left.unflatten(-1, (-1, block_size)).sum(-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["normal", "heavy", "lopsided", "outlier"]), rows=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_no_block_is_worse_than_rounded_to_nearest(form, kind, rows, seed):
    weight = weights(rows, 96, seed, kind)
    found = errors(weight, quantize(weight, form).dequantize(), 32)
    nearest = errors(weight, to_nearest(weight, form), 32)
    rounding = 2.0**-22 * weight.abs().max().double() ** 2 * importance(weight).max()  # of float32 numbers
    assert torch.all(found <= nearest * 1.00001 + rounding * 2.0**-22)


@pytest.mark.parametrize(("form", "gain"), [(FORMS[0], 0.85), (FORMS[1], 0.93)], ids=str)
def test_four_bits_are_clearly_better(form, gain):
    weight = weights(64, 576, 0)
    found, nearest = quantize(weight, form).dequantize(), to_nearest(weight, form)
    assert errors(weight, found, 32).sum() < gain * errors(weight, nearest, 32).sum()


def least_error(x: np.ndarray, v: np.ndarray, levels: int) -> float:
    """Over all assignments of codes: the best ones do not decrease as the weights increase."""
    order = np.argsort(x)
    x, v = x[order], v[order]
    codes = np.array(list(itertools.combinations_with_replacement(range(levels), len(x))), float)
    mean = (codes @ v / v.sum())[:, None]
    spread = (v * (codes - mean) ** 2).sum(1)
    around = x - (v @ x) / v.sum()
    explained = ((codes - mean) @ (v * around)) ** 2 / np.where(spread > 0, spread, 1)
    return float((v * around**2).sum() - explained.max())


def test_it_is_near_the_best_of_all_assignments_of_codes():
    """Of blocks of 8; in sum, because a block in which eight numbers fit sixteen levels by chance is found by chance."""
    weight = weights(24, 8, 1)
    form = Form(4, 8, offsets=True)
    v = importance(weight).double().numpy()
    best = sum(least_error(x, y, 16) for x, y in zip(weight.double().numpy(), v, strict=True))
    found = float(errors(weight, quantize(weight, form).dequantize(), 8).sum())
    nearest = float(errors(weight, to_nearest(weight, form), 8).sum())
    assert best <= found
    assert found - best < 0.5 * (nearest - best)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_in_such_blocks_already_is_found_again(form):
    """Blocks whose codes reach from the first to the last, as every quantiser writes them."""
    random = np.random.default_rng(2)
    codes = random.integers(1, 2**form.bits, (40, 96))
    codes.reshape(40, -1, 32)[..., 0], codes.reshape(40, -1, 32)[..., 1] = 1, 2**form.bits - 1
    if form.offsets:
        codes.reshape(40, -1, 32)[..., 0] = 0
    middle = 2 ** (form.bits - 1)
    scales = random.uniform(0.001, 0.01, (40, 3)).astype(np.float32).repeat(32, 1)
    offsets = random.uniform(-0.02, 0.02, (40, 3)).astype(np.float32).repeat(32, 1) if form.offsets else 0
    weight = torch.from_numpy(((codes - middle) * scales + offsets).astype(np.float32))
    assert relative_error(weight, quantize(weight, form)) < 1e-6


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-42, -3.7, 1e30])
def test_a_block_of_one_number(form, value):
    weight = torch.full((2, 64), value)
    held = quantize(weight, form).dequantize()
    torch.testing.assert_close(held, weight, rtol=1e-6, atol=1e-41)


def test_a_block_far_from_zero_does_not_cancel():
    weight = weights(8, 64, 3) + 1000
    error = (quantize(weight, FORMS[2]).dequantize() - weight).abs().max()  # 8 bits, offsets
    assert error < 2 * 0.2 / 255 + 2 * 1000 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    weight = weights(5, 64, 4).to(dtype)
    found, wanted = quantize(weight, INT4), quantize(weight.float(), INT4)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


def test_rows_do_not_know_of_each_other():
    weight = weights(1500, 64, 5)
    whole = quantize(weight, INT4)
    assert whole.form == INT4
    assert whole.shape == (1500, 64)
    for part in (slice(0, 1), slice(700, 707), slice(1499, 1500)):
        alone = quantize(weight[part], INT4)
        assert torch.equal(alone.codes, whole.codes[part])
        for found, wanted in ((alone.scales, whole.scales[part]), (alone.offsets, whole.offsets[part])):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)  # sums over blocks of another number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_shows_in_its_block_and_no_other(form, value):
    weight = weights(1, 64, 6)
    weight[0, 40] = value
    held = quantize(weight, form)
    parts = [held.scales] if held.offsets is None else [held.scales, held.offsets]
    assert not all(part[0, 1].isfinite() for part in parts)


def test_the_relative_error_is_that_of_the_definition():
    weight = weights(3, 32, 7)
    held = quantize(weight, INT4)
    v, w, q = (t.double().numpy() for t in (importance(weight), weight, held.dequantize()))
    assert relative_error(weight, held) == pytest.approx(((v * (w - q) ** 2).sum() / (v * w**2).sum()) ** 0.5, rel=1e-5)
    nothing = torch.zeros(1, 32)
    assert (
        relative_error(nothing, BlockQuantized(4, 32, torch.zeros(1, 16, dtype=torch.uint8), nothing[:, :1], None)) == 0
    )
