"""The kernels' source, run by Triton's interpreter, against float64 mathematics.

float32: 1e-6 relative, a few roundings of 6e-8. 16 bits: the exact result rounded once, so half a unit in the last
place, plus the float32 error before that rounding.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zonda.plugins_trt.add_rms_norm import AddRmsNorm
from zonda.plugins_trt.q_rms_norm import QRmsNorm
from zonda.plugins_trt.rms_norm import RmsNorm
from zonda.plugins_trt.rope import RoPE

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT32_ERROR = 1e-6
drawn = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_rounded_once(found: torch.Tensor, wanted: np.ndarray) -> None:
    info = torch.finfo(found.dtype)
    magnitude = np.maximum(np.abs(wanted), info.tiny)
    half_unit = 2.0 ** np.floor(np.log2(magnitude)) * info.eps / 2 if found.dtype != torch.float32 else 0.0
    excess = np.abs(exact(found) - wanted) - half_unit - FLOAT32_ERROR * np.abs(wanted)
    assert excess.max() <= info.smallest_normal * info.eps, excess.max()


def normed(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    eps = float(np.float32(eps))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


hidden_sizes = st.one_of(st.integers(1, 300), st.sampled_from([576, 896, 1023, 2048, 4097]))
dtypes = st.sampled_from(sorted(DTYPES))
scales = st.sampled_from([1e-3, 1.0, 300.0])
seeds = st.integers(0, 2**16)


@given(hidden_sizes, dtypes, scales, seeds, st.integers(1, 9), st.booleans())
@drawn
def test_rms_norm(interpret, hidden, dtype, scale, seed, rows, wide_gain):
    x = normal(seed, rows, hidden, scale=scale).to(DTYPES[dtype])
    weight = normal(seed + 1, hidden).to(torch.float32 if wide_gain else DTYPES[dtype])
    (y,) = interpret(RmsNorm(1e-5), [x, weight])
    assert_rounded_once(y, normed(exact(x), exact(weight), 1e-5))


@pytest.mark.parametrize("hidden", [8192, 16383, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_long_rows(interpret, hidden, dtype):
    x, weight = normal(0, 2, hidden).to(DTYPES[dtype]), normal(1, hidden).to(DTYPES[dtype])
    (y,) = interpret(RmsNorm(1e-6), [x, weight])
    assert_rounded_once(y, normed(exact(x), exact(weight), 1e-6))


def test_rms_norm_sees_eps_and_every_element(interpret):
    """The tolerance tells H from H + 1 and eps from 1.001 eps; a test that could not would prove little."""
    x, weight = torch.full((1, 1000), 1e-3), torch.ones(1000)
    (y,) = interpret(RmsNorm(1e-5), [x, weight])
    for wrong in (normed(exact(x), 1.0, 1.001e-5), exact(x) / np.sqrt((exact(x) ** 2).sum() / 1001 + 1e-5)):
        with pytest.raises(AssertionError):
            assert_rounded_once(y, wrong)


def test_an_empty_batch_is_no_launch(interpret):
    (y,) = interpret(RmsNorm(1e-5), [torch.zeros(0, 3, 8), torch.ones(8)])
    assert y.shape == (0, 3, 8)


@given(hidden_sizes, dtypes, scales, seeds, st.integers(1, 4))
@drawn
def test_add_rms_norm_norms_the_sum_as_it_is_stored(interpret, hidden, dtype, scale, seed, rows):
    x, residual = (normal(seed + i, rows, hidden, scale=scale).to(DTYPES[dtype]) for i in range(2))
    weight = normal(seed + 2, hidden).to(DTYPES[dtype])
    y, total = interpret(AddRmsNorm(1e-5), [x, residual, weight])
    assert torch.equal(total, x + residual)
    assert_rounded_once(y, normed(exact(total), exact(weight), 1e-5))


@given(st.integers(1, 40), st.sampled_from([1, 3, 32]), dtypes, dtypes, seeds, st.booleans())
@drawn
def test_q_rms_norm(interpret, groups, group, dtype, scale_dtype, seed, flat):
    x = normal(seed, 3, groups * group).to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (groups, group), generator=generator, dtype=torch.int8)
    steps = normal(seed + 1, groups, scale=0.01).to(DTYPES[scale_dtype])
    (y,) = interpret(QRmsNorm(1e-5), [x, codes.flatten() if flat else codes, steps])
    gain = (codes.double() * steps.double()[:, None]).flatten().numpy()
    assert_rounded_once(y, normed(exact(x), gain, 1e-5))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, heads: int, interleaved: bool):
    """The rotation in float64, and for every element the norm of the pair it belongs to (its own size if unrotated)."""
    split = x.reshape(*x.shape[:-1], heads, -1)
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b, c, s = split[..., first], split[..., second], cos[..., None, :], sin[..., None, :]
    result, norm = split.copy(), np.abs(split)
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    norm[..., first] = norm[..., second] = np.hypot(a, b)
    return result.reshape(x.shape), norm.reshape(x.shape)


def assert_rotated(found: torch.Tensor, wanted: np.ndarray, norm: np.ndarray) -> None:
    rounding = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 2
    smallest = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert (np.abs(exact(found) - wanted) <= norm * (rounding + FLOAT32_ERROR) + smallest).all()


@given(
    heads=st.integers(1, 9),
    key_heads=st.integers(0, 5),
    half=st.integers(1, 40),
    rest=st.sampled_from([0, 0, 1, 8, 17]),
    interleaved=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@drawn
def test_rope(interpret, heads, key_heads, half, rest, interleaved, dtype, seed):
    dim, batch, tokens, table = 2 * half + rest, 2, 3, 50
    angles = normal(seed, table, half, scale=3)
    cos, sin = angles.cos().float(), angles.sin().float()
    positions = torch.randint(0, table, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    inputs = [normal(seed + i, batch, tokens, n * dim).to(DTYPES[dtype]) for i, n in enumerate((heads, key_heads)) if n]
    node = RoPE(heads, key_heads, int(interleaved), 2 * half)
    outputs = interpret(node, [*inputs, cos, sin, positions])
    assert len(outputs) == len(inputs)
    rows = exact(cos)[positions.numpy()], exact(sin)[positions.numpy()]
    for x, found, count in zip(inputs, outputs, (heads, key_heads), strict=False):
        assert_rotated(found, *rotated(exact(x), *rows, count, interleaved))


@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (71, 1, 64, 16), (16, 16, 512, 256)], ids=str)
def test_rope_of_models(interpret, shape):
    """Many heads take several tiles a token."""
    heads, key_heads, dim, half = shape
    angles = normal(0, 9, half)
    q, k = normal(1, 1, 2, heads * dim).half(), normal(2, 1, 2, key_heads * dim).half()
    positions = torch.tensor([[8, 3]])
    found = interpret(
        RoPE(heads, key_heads, 0, 2 * half), [q, k, angles.cos().float(), angles.sin().float(), positions]
    )
    rows = [exact(table.float())[positions.numpy()] for table in (angles.cos(), angles.sin())]
    for x, y, count in zip((q, k), found, (heads, key_heads), strict=True):
        assert_rotated(y, *rotated(exact(x), *rows, count, False))


@pytest.mark.parametrize("position", [-1, 9, 2**40])
def test_a_position_outside_the_tables_gives_nan_and_reads_nothing(interpret, position):
    q = normal(0, 1, 2, 12).float()
    (found,) = interpret(RoPE(2, 0, 0, 4), [q, torch.ones(9, 2), torch.zeros(9, 2), torch.tensor([[position, 3]])])
    turned = found.reshape(2, 2, 6)
    assert turned[0, :, :4].isnan().all()
    assert torch.equal(turned[0, :, 4:], q.reshape(2, 2, 6)[0, :, 4:])
    assert torch.equal(turned[1], q.reshape(2, 2, 6)[1])
