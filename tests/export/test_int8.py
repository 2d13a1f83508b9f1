"""Linears over many tokens in 8 bits: the weights as derived, and the products of ONNX Runtime against float64."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from zonda.export.functions import DOMAIN
from zonda.export.lower import int8
from zonda.export.lower.int8 import Int8Weight, derived_source, round_linears
from zonda.export.lower.rewrite import MICROSOFT, drop_unused
from zonda.models.ops.blocks import dequantize
from zonda.runtime import contract
from zonda.runtime.engines import ort_session
from zonda.runtime.engines.ort_session import open_session, products_saturate

TOKENS, COLUMNS, ROWS, BLOCK = (3, 7), 64, 48, 32


def random_blocks(name: str, rows: int, columns: int, seed: int, bits: int = 4) -> dict[str, torch.Tensor]:
    """Codes, scales and offsets of a weight (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=generator)
    shape = (rows, columns // BLOCK)
    scales, offsets = (torch.randn(shape, generator=generator) * factor for factor in (0.02, 0.05))
    return {f"{name}.codes": codes, f"{name}.scales": scales, f"{name}.offsets": offsets}


def floats(state: dict[str, torch.Tensor], name: str, bits: int = 4) -> np.ndarray:
    """The weight (rows, columns) in float64."""
    parts = (state[f"{name}.{part}"] for part in ("codes", "scales", "offsets"))
    return dequantize(*parts, bits, BLOCK).double().numpy()


class Graph:
    """A graph in which QLinears of random weights can be put together."""

    def __init__(self, columns: int = COLUMNS) -> None:
        dims = [contract.BATCH, contract.SEQUENCE]
        ids = ir.Value(name=contract.INPUT_IDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(dims))
        self.x = self.typed(ir.Value(name="x"), columns)
        self.state: dict[str, torch.Tensor] = {}
        self.graph = ir.Graph([ids, self.x], [], nodes=[], opset_imports={"": 24, DOMAIN: 1, MICROSOFT: 1}, name="g")

    @staticmethod
    def typed(value: ir.Value, width: int) -> ir.Value:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([contract.BATCH, contract.SEQUENCE, width])
        return value

    def add(self, op_type: str, inputs, width: int, attributes=None, domain: str = "") -> ir.Value:
        node = ir.node(op_type, inputs, attributes or {}, domain=domain)
        self.graph.append(node)
        return self.typed(node.outputs[0], width)

    def linear(self, name: str, x: ir.Value, rows: int, state: dict[str, torch.Tensor]) -> ir.Value:
        self.state |= state
        weights = []
        for key, tensor in state.items():
            dtype = ir.DataType.UINT8 if tensor.dtype == torch.uint8 else ir.DataType.FLOAT
            value = ir.Value(name=key, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape))
            self.graph.initializers[key] = value
            weights.append(value)
        return self.add("QLinear", [x, *weights], rows, {"bits": 4, "block_size": BLOCK}, DOMAIN)

    def run(self, y: ir.Value, x: np.ndarray, folder) -> np.ndarray:
        """What ONNX Runtime computes of `y` once all linears are rounded."""
        y.name = "y"
        self.graph.outputs.append(y)
        model = ir.Model(self.graph, ir_version=11)
        derived = round_linears(self.graph, {})
        drop_unused(model)
        source = derived_source(derived, self.state.__getitem__)
        for name in derived:
            self.graph.initializers[name].const_value = ir.tensor(source(name).numpy())
        path = folder / "graph.onnx"
        ir.save(model, path)
        session = open_session(path, 1, "cpu")
        return session.run(None, {contract.INPUT_IDS: np.zeros(x.shape[:2], np.int64), "x": x})[0]


def activations(seed: int = 0, columns: int = COLUMNS) -> np.ndarray:
    """(B, S, K) with a token of zeros, a token with one large value, and tokens of very different size."""
    x = np.random.default_rng(seed).standard_normal((*TOKENS, columns)).astype(np.float32)
    x *= 10.0 ** np.arange(-3, 4, dtype=np.float32)[None, :, None]
    x[0, 0] = 0
    x[1, 1, 5] = 1e4
    return x


def bound(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The most that y (B, S, N) may be off: half a step of each factor, and float32 where steps are multiplied.

    |x'w' - xw| <= |x| dw + |w| dx + dx dw, summed over K. Codes are rounded of quotients that are float32 themselves:
    a quotient up to 127 is off by less than 2^-16, so half a step is a little more.
    """
    half = 0.5 + 2.0**-15
    dx = half * np.abs(x.astype(np.float64)).max(-1, keepdims=True) / 127
    dw = half * np.abs(weight).max(1) / 127
    of_weights = np.abs(x.astype(np.float64)).sum(-1, keepdims=True) * dw
    of_both = dx * (np.abs(weight).sum(1) + weight.shape[1] * dw)
    largest = np.abs(x.astype(np.float64)) @ np.abs(weight.T)
    return of_weights + of_both + 2.0**-20 * largest


def test_a_weight_is_the_nearest_of_255_steps_a_row_transposed():
    state = random_blocks("w", ROWS, COLUMNS, 0)
    weight, scales = Int8Weight(("w",), 4, BLOCK, offsets=True).derive(state.__getitem__)
    assert (weight.shape, weight.dtype, scales.dtype) == ((COLUMNS, ROWS), torch.int8, torch.float32)
    assert weight.is_contiguous()
    wanted = floats(state, "w")
    assert (weight.abs().amax(0) == 127).all()
    error = np.abs(weight.T.double().numpy() * scales.double().numpy()[:, None] - wanted)
    assert (error <= (0.5 + 2.0**-15) * scales.double().numpy()[:, None]).all()


def test_joined_weights_lie_side_by_side_in_whatever_parts_they_are_made(monkeypatch):
    state = random_blocks("q", 40, COLUMNS, 1, bits=8) | random_blocks("k", 24, COLUMNS, 2, bits=8)
    joined = Int8Weight(("q", "k"), 8, BLOCK, offsets=True)
    weight, scales = joined.derive(state.__getitem__)
    monkeypatch.setattr(int8, "_TOGETHER", 7 * COLUMNS)
    for begin, end, name in ((0, 40, "q"), (40, 64, "k")):
        own, own_scales = Int8Weight((name,), 8, BLOCK, offsets=True).derive(state.__getitem__)
        torch.testing.assert_close(weight[:, begin:end], own, rtol=0, atol=0)
        torch.testing.assert_close(scales[begin:end], own_scales, rtol=0, atol=0)


def test_a_row_of_zeros_has_a_scale_of_zero():
    state = random_blocks("w", ROWS, COLUMNS, 0)
    state["w.scales"][3] = state["w.offsets"][3] = 0
    weight, scales = Int8Weight(("w",), 4, BLOCK, offsets=True).derive(state.__getitem__)
    assert (scales[3], weight[:, 3].abs().max()) == (0, 0)


def test_a_linear_is_off_by_no_more_than_its_roundings(tmp_path):
    made, x, state = Graph(), activations(), random_blocks("w", ROWS, COLUMNS, 0)
    found = made.run(made.linear("w", made.x, ROWS, state), x, tmp_path)
    weight = floats(state, "w")
    error, allowed = np.abs(found - x.astype(np.float64) @ weight.T), bound(x, weight)
    assert (error <= allowed).all()
    assert not found[0, 0].any()  # zeros, not 0 / 0
    assert (error > allowed / 1000).any()  # the bound is not one that anything keeps


def test_tokens_do_not_share_a_scale(tmp_path):
    x, state = activations(), random_blocks("w", ROWS, COLUMNS, 0)
    results = []
    for change in (1.0, 1e4):
        made = Graph()
        x[2, 6] *= np.float32(change)
        results.append(made.run(made.linear("w", made.x, ROWS, state), x, tmp_path))
    np.testing.assert_array_equal(results[0][:2], results[1][:2])
    np.testing.assert_allclose(results[1][2, 6], results[0][2, 6] * 1e4, rtol=1e-4)


def test_a_scale_that_waits_for_the_next_rounding_comes_back(tmp_path):
    """down(silu(gate(x)) * up(x)): the product's codes are made without the scale of `up`, which joins their step."""
    states = [random_blocks(name, 64, COLUMNS, seed) for seed, name in enumerate(("gate", "up"))]
    down, x, made = random_blocks("down", ROWS, 64, 2), activations() / 100, Graph()
    gate, up = (made.linear(n, made.x, 64, state) for n, state in zip(("gate", "up"), states, strict=True))
    silu = made.add("QuickGelu", [gate], 64, {"alpha": 1.0}, MICROSOFT)
    product = made.add("Mul", [silu, up], 64)
    found = made.run(made.linear("down", product, ROWS, down), x, tmp_path)
    operators = [node.op_type for node in made.graph]
    assert operators.count("MatMulIntegerToFloat") == 3
    scaled = [n for n in made.graph if n.op_type == "Mul" and n.inputs[0].producer().op_type == "MatMulIntegerToFloat"]
    assert len(scaled) == 2  # gate and down

    # The same, each linear by itself and in full.
    def alone(name, values, state, rows):
        part = Graph()
        return part.run(part.linear(name, part.x, rows, state), values, tmp_path).astype(np.float64)

    g, u = (alone(n, x, state, 64) for n, state in zip(("gate", "up"), states, strict=True))
    h = (g / (1 + np.exp(-g)) * u).astype(np.float32)
    wanted = alone("down", h, down, ROWS)
    # A product that lies between two codes may fall either way: one code of one activation, here and there.
    one_code = np.abs(h).max(-1, keepdims=True) / 127 * np.abs(floats(down, "down")).max()
    assert (np.abs(found - wanted) <= 1.1 * one_code + 1e-5 * np.abs(wanted)).all()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_the_largest_products_do_not_saturate(tmp_path):
    """255 · 127 twice is twice what 16 bits hold: an x86 without VNNI adds pairs there."""
    state = random_blocks("w", ROWS, COLUMNS, 0)
    state["w.codes"][:] = 0xFF
    state["w.scales"][:], state["w.offsets"][:] = 1 / 7, 0
    made, x = Graph(), np.ones((*TOKENS, COLUMNS), np.float32)
    found = made.run(made.linear("w", made.x, ROWS, state), x, tmp_path)
    np.testing.assert_allclose(found, COLUMNS, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "machine", "saturate"),
    [
        ("fpu avx2 avx512_vnni", "x86_64", False),
        ("fpu avx2 avx_vnni", "AMD64", False),
        ("fpu avx2", "x86_64", True),
        (None, "x86_64", True),
        (None, "aarch64", False),
    ],
)
def test_which_processors_saturate(tmp_path, monkeypatch, flags, machine, saturate):
    monkeypatch.setattr(ort_session.platform, "machine", lambda: machine)
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert products_saturate(file) is saturate


@pytest.mark.parametrize("saturate", [True, False])
def test_a_session_on_a_processor_that_saturates_is_told_so(tmp_path, monkeypatch, saturate):
    told = {}

    class Options(ort_session.ort.SessionOptions):
        def add_session_config_entry(self, key, value):
            told[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(ort_session.ort, "SessionOptions", Options)
    monkeypatch.setattr(ort_session, "products_saturate", lambda: saturate)
    made, x, state = Graph(), activations(), random_blocks("w", ROWS, COLUMNS, 0)
    found = made.run(made.linear("w", made.x, ROWS, state), x, tmp_path)
    assert told == ({"session.x64quantprecision": "1"} if saturate else {})
    assert (np.abs(found - x.astype(np.float64) @ floats(state, "w").T) <= bound(x, floats(state, "w"))).all()
