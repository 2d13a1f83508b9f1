"""The markers as torch ops: well-formed, compilable, and true to independent numpy mathematics in float64."""

import numpy as np
import pytest
import torch
from support import randomise

from zonda.models import ops
from zonda.models.cache import Cache
from zonda.models.llama import Llama, LlamaConfig
from zonda.models.ops.blocks import pack, unpack


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bytes8(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def codes8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)


POSITIONS = torch.tensor([[3, 4, 5], [0, 1, 2]])
OFFSETS = torch.tensor([3, 0], dtype=torch.int32)

SAMPLES = {
    "rms_norm": (ops.rms_norm, (normal(2, 3, 8), normal(8), 1e-5)),
    "q_rms_norm": (ops.q_rms_norm, (normal(2, 3, 8), codes8(2, 4), normal(2), 1e-5)),
    "rope": (ops.rope, (normal(2, 3, 32), normal(2, 3, 16), normal(9, 4), normal(9, 4), POSITIONS, 4, 2, False)),
    "rope_single": (ops.rope_single, (normal(2, 3, 32), normal(9, 3), normal(9, 3), POSITIONS, 4, True)),
    "kv_cache_update": (ops.kv_cache_update, (normal(2, 2, 9, 4), normal(2, 3, 8), OFFSETS)),
    "cached_attention": (
        ops.cached_attention,
        (normal(2, 3, 16), normal(2, 2, 9, 4), normal(2, 2, 9, 4), POSITIONS, normal(4), 4, 0.5, 2, 5.0),
    ),
    "q_linear 8 bits": (ops.q_linear, (normal(2, 3, 8), bytes8(5, 8), normal(5, 2), None, 8, 4)),
    "q_linear 4 bits": (ops.q_linear, (normal(2, 8), bytes8(5, 4), normal(5, 2), normal(5, 2), 4, 4)),
    "q_embedding 8 bits": (ops.q_embedding, (POSITIONS, bytes8(6, 8), normal(6, 2), None, 8, 4)),
    "q_embedding 4 bits": (ops.q_embedding, (POSITIONS, bytes8(6, 4), normal(6, 2), normal(6, 2), 4, 4)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op, arguments = SAMPLES[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(name, dtype):
    """In 16 bits the result is the float64 result of the same inputs, rounded: statistics are never kept in 16 bits."""
    op, arguments = SAMPLES[name]
    half = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in half]
    found, wanted = op(*half), op(*exact)
    for got, want in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (found, wanted)), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_rms_norm_is_the_formula():
    x, weight = normal(2, 3, 7, dtype=torch.float64).numpy(), normal(7, dtype=torch.float64).numpy()
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight
    found = ops.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-3)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_q_rms_norm_is_rms_norm_of_the_dequantised_gain():
    x, codes, scales = normal(2, 64), codes8(2, 32), normal(2)
    gain = torch.cat([codes[b].float() * scales[b] for b in range(2)])
    torch.testing.assert_close(ops.q_rms_norm(x, codes, scales, 1e-5), ops.rms_norm(x, gain, 1e-5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_rotation_of_the_first_dimensions(interleaved):
    """Pairs as complex numbers times exp(i·angle); dimensions beyond the rotary ones pass through."""
    heads, dim, rotary = 3, 10, 6
    angles = torch.arange(9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.07], dtype=torch.float64)
    q = normal(2, 3, heads * dim, dtype=torch.float64)
    found, _ = ops.rope(q, q[..., :dim], angles.cos(), angles.sin(), POSITIONS, heads, 1, interleaved)
    split = q.numpy().reshape(2, 3, heads, dim)
    if interleaved:
        pairs = split[..., 0:rotary:2] + 1j * split[..., 1:rotary:2]
    else:
        pairs = split[..., : rotary // 2] + 1j * split[..., rotary // 2 : rotary]
    turned = pairs * np.exp(1j * angles.numpy()[POSITIONS.numpy()])[:, :, None]
    wanted = split.copy()
    if interleaved:
        wanted[..., 0:rotary:2], wanted[..., 1:rotary:2] = turned.real, turned.imag
    else:
        wanted[..., : rotary // 2], wanted[..., rotary // 2 : rotary] = turned.real, turned.imag
    np.testing.assert_allclose(found.numpy(), wanted.reshape(2, 3, -1), rtol=1e-12, atol=1e-12)


def test_kv_cache_update_writes_each_row_at_its_offset_and_nothing_else():
    cache, new = normal(2, 2, 9, 4), normal(2, 3, 8, seed=1)
    wanted = cache.clone()
    for b, offset in enumerate(OFFSETS.tolist()):
        for s in range(3):
            wanted[b, :, offset + s] = new[b, s].view(2, 4)
    assert torch.equal(ops.kv_cache_update(cache, new, OFFSETS), wanted)


def test_kv_cache_update_refuses_to_write_past_the_end():
    with pytest.raises(IndexError, match="cache of 9"):
        ops.kv_cache_update(normal(1, 2, 9, 4), normal(1, 3, 8), torch.tensor([7], dtype=torch.int32))


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_cached_attention_is_softmax_over_the_visible_keys(window, softcap, with_sinks):
    heads, kv_heads, dim, value_dim = 4, 2, 4, 6
    q = normal(2, 3, heads * dim, dtype=torch.float64)
    key, value = (
        normal(2, kv_heads, 9, dim, dtype=torch.float64),
        normal(2, kv_heads, 9, value_dim, dtype=torch.float64),
    )
    sinks = normal(heads, dtype=torch.float64) if with_sinks else None
    found = ops.cached_attention(q, key, value, POSITIONS, sinks, heads, 0.7, window, softcap)
    wanted = np.zeros((2, 3, heads, value_dim))
    for b, s, h in np.ndindex(2, 3, heads):
        position = int(POSITIONS[b, s])
        first = max(0, position - window + 1) if window else 0
        keys, values = (t[b, h // 2, first : position + 1].numpy() for t in (key, value))
        logits = keys @ q[b, s, h * dim : (h + 1) * dim].numpy() * 0.7
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits)
        total = weights.sum() + (np.exp(float(sinks[h])) if sinks is not None else 0)
        wanted[b, s, h] = weights @ values / total
    np.testing.assert_allclose(found.numpy(), wanted.reshape(2, 3, -1), rtol=1e-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_q_linear_and_q_embedding_are_centred_codes_times_scales_plus_offsets(bits):
    n, k, block = 5, 16, 8
    rng = np.random.default_rng(0)
    codes, zero = rng.integers(0, 2**bits, (n, k)), 2 ** (bits - 1)
    scales, offsets, x = rng.normal(size=(n, 2)), rng.normal(size=(n, 2)), rng.normal(size=(3, k))
    weight = (codes - zero) * scales.repeat(block, 1) + offsets.repeat(block, 1)
    stored = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes).astype(np.uint8))
    assert torch.equal(unpack(stored, bits), torch.from_numpy(codes.astype(np.uint8)))
    assert torch.equal(pack(unpack(stored, bits), bits), stored)
    found = ops.q_linear(
        *(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (x, stored, scales, offsets)), bits, block
    )
    np.testing.assert_allclose(found.numpy(), x @ weight.T, rtol=1e-10)
    rows = ops.q_embedding(POSITIONS % n, stored, torch.from_numpy(scales), torch.from_numpy(offsets), bits, block)
    np.testing.assert_allclose(rows.numpy(), weight[POSITIONS % n], rtol=1e-10)


def test_a_model_compiles_whole_and_dynamic():
    config = LlamaConfig.read(
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    model = Llama(config, 16).eval()
    randomise(model)

    def run(batch: int, length: int, forward) -> torch.Tensor:
        ids = torch.arange(batch * length).reshape(batch, length) % 50
        positions = torch.arange(length).expand(batch, length)
        offsets, lens = torch.zeros(batch, dtype=torch.int32), torch.full((batch,), length, dtype=torch.int32)
        cache = Cache.zeros(model.kv_shapes, batch, 16)
        with torch.no_grad():
            return forward(ids, offsets, positions, lens, positions, cache)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 3), (3, 5)):
        torch.testing.assert_close(run(*shape, compiled), run(*shape, model))
