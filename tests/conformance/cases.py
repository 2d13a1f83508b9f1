"""Cases of every marker, drawn by hypothesis: what is computed, on which inputs, with which attributes.

Hypothesis draws the structure (shapes, offsets, attributes) and a seed; numpy fills the arrays. Nothing is left at a
value that hides a mistake: gains are far from 1, norms see rows of any magnitude and rows of zeros, RoPE tables are
random angles (a wrong row is never nearly right), caches are full of other values beyond what is valid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
STORED = ("codes", "scales", "offsets")
"""Inputs that are weights in a quantised form: constants of a graph."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator of a case, a marker or ONNX's Add: names of its inputs and outputs in the case."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Case:
    """One computation.

    calls: in order. results: names of the outputs that are compared. attributes: by ONNX name, of all calls.
    inputs: by name, None if absent. float64 arrays are "of the type under test" and become it; float32 stays.
    shapes: inputs with static dimensions, as a universal graph declares them; all others are dynamic.
    """

    calls: tuple[Call, ...]
    results: tuple[str, ...]
    inputs: Mapping[str, np.ndarray | None]
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[str | int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Small arrays, as hypothesis finds them when it shrinks, in full; of large ones the shape."""
        inputs = {
            name: a if a is None else f"{a.dtype}{a.tolist() if a.size <= 16 else list(a.shape)}"
            for name, a in self.inputs.items()
        }
        return f"Case({' '.join(call.operator for call in self.calls)}, {inputs}, {dict(self.attributes)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the fields of a dataclass

    def of(self, dtype: str) -> "Case":
        """The case with its inputs rounded to `dtype`; the reference is then taken of exactly these."""
        return replace(self, inputs={name: _cast(name, array, dtype) for name, array in self.inputs.items()})

    def widened(self) -> dict[str, np.ndarray | None]:
        """The inputs as the reference wants them: floats exactly as they are, in float64; integers untouched."""
        return {
            name: array if array is None or array.dtype.kind in "iu" else array.astype(np.float64)
            for name, array in self.inputs.items()
        }


def _cast(name: str, array: np.ndarray | None, dtype: str) -> np.ndarray | None:
    if array is None or array.dtype != np.float64:
        return array
    # Quantised checkpoints hold float32 scales at most, and no runtime dequantises to float64.
    return array.astype(DTYPES["float32" if dtype == "float64" and name in STORED else dtype])


def _single(value: float) -> float:
    """An ONNX attribute is a float32: drawn as one, it is the same number in every execution."""
    return float(np.float32(value))


STORED_AS = st.sampled_from([np.float32, np.float64, np.float16])
EPS = st.sampled_from([_single(1e-6), _single(1e-5), _single(1e-3)])


@st.composite
def _random(draw: Any) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def _hidden_states(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows (last axis) between 1e-4 and 1e2 in size, some with an outlier, some of zeros: as residual streams are."""
    x = rng.normal(size=shape)
    x[..., 0] *= rng.choice([1, 1, 20], shape[:-1])
    return x * (rng.random(shape[:-1]) > 0.1)[..., None] * 10 ** rng.uniform(-4, 2, shape[:-1])[..., None]


def _gain(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(1, 0.5, size) * rng.choice([1, -1], size)


@st.composite
def _leading(draw: Any) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 4), max_size=3)))


WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 33, 64, 100, 257])


@st.composite
def rms_norm(draw: Any) -> Case:
    """Any rank, odd widths, a width of 1."""
    rng, width = draw(_random()), draw(WIDTHS)
    inputs = {"x": _hidden_states(rng, *draw(_leading()), width), "weight": _gain(rng, width)}
    return Case((Call("RmsNorm", ("x", "weight"), ("y",)),), ("y",), inputs, {"eps": draw(EPS)})


@st.composite
def add_rms_norm(draw: Any) -> Case:
    """A residual stream and what is added to it, of any rank, both with rows of any size."""
    rng, width = draw(_random()), draw(WIDTHS)
    shape = (*draw(_leading()), width)
    inputs = {
        "x": _hidden_states(rng, *shape),
        "residual": _hidden_states(rng, *shape),
        "weight": _gain(rng, width),
    }
    calls = (Call("Add", ("x", "residual"), ("sum",)), Call("RmsNorm", ("sum", "weight"), ("y",)))
    dims = (*("batch", "sequence", "heads")[: len(shape) - 1], width)
    return Case(calls, ("y", "sum"), inputs, {"eps": draw(EPS)}, {"x": dims, "residual": dims})


@st.composite
def q_rms_norm(draw: Any) -> Case:
    """Blocks of any size; scales float16, float32 or of the type of x."""
    rng = draw(_random())
    blocks, block = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 16, 32]))
    scales = rng.uniform(0.002, 0.02, blocks) * rng.choice([1, -1], blocks)
    inputs = {
        "x": _hidden_states(rng, *draw(_leading()), blocks * block),
        "codes": rng.integers(-128, 128, (blocks, block)).astype(np.int8),
        "scales": scales.astype(draw(STORED_AS)),
    }
    calls = (Call("QRmsNorm", ("x", "codes", "scales"), ("y",)),)
    return Case(calls, ("y",), inputs, {"eps": draw(EPS)})


def _tables(rng: np.random.Generator, rows: int, pairs: int, factor: float) -> dict[str, np.ndarray]:
    angles = rng.uniform(0, 2 * np.pi, (rows, pairs))
    return {"cos": (factor * np.cos(angles)).astype(np.float32), "sin": (factor * np.sin(angles)).astype(np.float32)}


@st.composite
def _ragged(draw: Any, most_offset: int = 9, most_length: int = 6) -> tuple[int, np.ndarray, np.ndarray]:
    """(S, seqlen_offsets, input_lens): rows at offsets of their own, padded to S, some of them idle.

    Most often some row fills its S tokens; a batch padded further than any row needs is drawn too.
    """
    length = draw(st.integers(1, most_length))
    first = draw(st.sampled_from([False, False, True]))  # the first chunk of every row
    row = st.tuples(st.integers(0, 0 if first else most_offset), st.integers(0, length))
    offsets, lens = np.array(draw(st.lists(row, min_size=1, max_size=4)), np.int32).T
    if draw(st.sampled_from([True, True, False])):
        lens[lens.argmax()] = length
    return length, offsets.copy(), lens.copy()


@st.composite
def rope(draw: Any, single: bool = False) -> Case:
    """Full and partial rotation, both pairings, few and many heads, positions from 0 to the far end of long tables."""
    rng = draw(_random())
    length, offsets, _ = draw(_ragged())
    heads, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 7, 10, 16, 64]))
    pairs = draw(st.one_of(st.just(head_dim // 2), st.integers(1, head_dim // 2)))
    far = draw(st.sampled_from([0, 0, 7, 4000]))  # where the batch lies
    positions = (offsets[:, None] + far + np.arange(length)).astype(np.int64)
    inputs = {
        "q": rng.normal(size=(len(offsets), length, heads * head_dim)),
        "k": None if single else rng.normal(size=(len(offsets), length, kv_heads * head_dim)),
        **_tables(rng, int(positions.max()) + 1, pairs, draw(st.sampled_from([1.0, 1.25]))),
        "start_offsets_kernel": positions,
    }
    attributes = {
        "num_heads": heads,
        "num_key_value_heads": 0 if single else kv_heads,
        "interleaved": draw(st.integers(0, 1)),
        "rotary_dim": 2 * pairs,
    }
    results = ("q_out",) if single else ("q_out", "k_out")
    return Case((Call("RoPE", tuple(inputs), results),), results, inputs, attributes)


@st.composite
def kv_cache_update(draw: Any) -> Case:
    """Ragged offsets, padding, idle rows, caches that are just large enough and larger."""
    rng = draw(_random())
    length, offsets, lens = draw(_ragged())
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    capacity = int(offsets.max()) + length + draw(st.integers(0, 3))
    inputs = {
        "cache": rng.normal(size=(len(offsets), heads, capacity, head_dim)),
        "new": rng.normal(size=(len(offsets), length, heads * head_dim)),
        "seqlen_offsets": offsets,
        "input_lens": lens,
    }
    calls = (Call("KvCacheUpdate", ("cache", "new", "seqlen_offsets"), ("updated",)),)
    return Case(calls, ("updated",), inputs)


@st.composite
def _attention_attributes(draw: Any, heads: int, head_dim: int) -> dict[str, int | float]:
    return {
        "num_heads": heads,
        "scale": draw(st.sampled_from([_single(head_dim**-0.5), 0.5])),
        "window": draw(st.sampled_from([0, 0, 1, 2, 5])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
    }


@st.composite
def _sinks(draw: Any, rng: np.random.Generator, heads: int) -> np.ndarray | None:
    return rng.normal(1, 1, heads) if draw(st.booleans()) else None


@st.composite
def cached_attention(draw: Any) -> Case:
    """Every combination of grouping, window, softcap and sinks; value heads of another size; caches with stale ends."""
    rng = draw(_random())
    length, offsets, _ = draw(_ragged())
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim, value_dim = draw(st.sampled_from([1, 3, 8, 16])), draw(st.sampled_from([1, 5, 8]))
    capacity = int(offsets.max()) + length + draw(st.integers(0, 4))
    heads, batch = kv_heads * groups, len(offsets)
    inputs = {
        "q": rng.normal(size=(batch, length, heads * head_dim)),
        "key_cache": rng.normal(size=(batch, kv_heads, capacity, head_dim)),
        "value_cache": rng.normal(size=(batch, kv_heads, capacity, value_dim)),
        "start_offsets_kernel": (offsets[:, None] + np.arange(length)).astype(np.int64),
        "sinks": draw(_sinks(rng, heads)),
    }
    calls = (Call("CachedAttention", tuple(inputs), ("attended",)),)
    return Case(calls, ("attended",), inputs, draw(_attention_attributes(heads, head_dim)))


@st.composite
def rope_kv_cache_attention(draw: Any) -> Case:
    """What a layer's attention is made of, under the names of the graph contract; heads of sizes that fuse and not.

    The physical capacity is at least 1 + S: the contract asks for a capacity, and S more.
    """
    rng = draw(_random())
    length, offsets, lens = draw(_ragged())
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([16, 16, 32, 24, 6]))
    value_dim = draw(st.sampled_from([head_dim, head_dim, head_dim, head_dim, 5]))
    pairs = draw(st.sampled_from([head_dim // 2, head_dim // 2, head_dim // 2, head_dim // 4]))
    heads, batch = kv_heads * groups, len(offsets)
    capacity = max(1, int(offsets.max())) + length + draw(st.integers(0, 4))
    inputs = {
        "q": rng.normal(size=(batch, length, heads * head_dim)),
        "k": rng.normal(size=(batch, length, kv_heads * head_dim)),
        "v": rng.normal(size=(batch, length, kv_heads * value_dim)),
        "past_key": rng.normal(size=(batch, kv_heads, capacity, head_dim)),
        "past_value": rng.normal(size=(batch, kv_heads, capacity, value_dim)),
        **_tables(rng, capacity + draw(st.sampled_from([0, 1000])), pairs, 1.0),
        "seqlen_offsets": offsets,
        "start_offsets_kernel": (offsets[:, None] + np.arange(length)).astype(np.int64),
        "input_lens": lens,
        "sinks": draw(_sinks(rng, heads)),
    }
    attributes = draw(_attention_attributes(heads, head_dim)) | {
        "num_key_value_heads": kv_heads,
        "interleaved": draw(st.integers(0, 1)),
        "rotary_dim": 2 * pairs,
    }
    calls = (
        Call("RoPE", ("q", "k", "cos", "sin", "start_offsets_kernel"), ("q_turned", "k_turned")),
        Call("KvCacheUpdate", ("past_key", "k_turned", "seqlen_offsets"), ("present_key",)),
        Call("KvCacheUpdate", ("past_value", "v", "seqlen_offsets"), ("present_value",)),
        Call(
            "CachedAttention",
            ("q_turned", "present_key", "present_value", "start_offsets_kernel", "sinks"),
            ("attended",),
        ),
    )
    shapes = {
        "past_key": ("batch", kv_heads, "capacity", head_dim),
        "past_value": ("batch", kv_heads, "capacity", value_dim),
        "cos": ("positions", pairs),
        "sin": ("positions", pairs),
    }
    return Case(calls, ("attended", "present_key", "present_value"), inputs, attributes, shapes)


@st.composite
def q_linear(draw: Any) -> Case:
    """4 and 8 bits, with and without offsets, blocks of any size, one row and many; scales float16, float32 or as x."""
    rng = draw(_random())
    bits = draw(st.sampled_from([4, 8]))
    block = draw(st.sampled_from([2, 4, 16, 32] if bits == 4 else [1, 3, 4, 16, 32]))
    rows, blocks = draw(st.sampled_from([1, 5, 16, 33])), draw(st.integers(1, 4))
    stored_as = draw(STORED_AS)
    inputs = {
        "x": rng.normal(size=(*draw(_leading()), blocks * block)) * 10 ** rng.uniform(-2, 1),
        "codes": _codes(rng, rows, blocks * block, bits),
        "scales": _scales(rng, rows, blocks, bits).astype(stored_as),
        "offsets": rng.normal(size=(rows, blocks)).astype(stored_as) if draw(st.booleans()) else None,
    }
    calls = (Call("QLinear", tuple(inputs), ("y",)),)
    return Case(calls, ("y",), inputs, {"bits": bits, "block_size": block})


@st.composite
def moe(draw: Any) -> Case:
    """One expert of several to all of them, with and without biases and limit; scores so far apart that none tie."""
    rng = draw(_random())
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    experts, width, inner = (
        draw(st.integers(1, 6)),
        draw(st.sampled_from([4, 8, 33])),
        draw(st.sampled_from([3, 8, 16])),
    )
    ranks = rng.permuted(np.broadcast_to(np.arange(experts), (batch, length, experts)), axis=-1)
    biased = draw(st.booleans())
    inputs = {
        "x": rng.normal(size=(batch, length, width)),
        "router_logits": ranks * 0.5 + rng.uniform(-0.1, 0.1, ranks.shape),
        "gate_up": rng.normal(size=(experts, 2 * inner, width)) / width**0.5,
        "down": rng.normal(size=(experts, width, inner)) / inner**0.5,
        "gate_up_bias": rng.normal(size=(experts, 2 * inner)) if biased else None,
        "down_bias": rng.normal(size=(experts, width)) if biased else None,
    }
    attributes = {
        "top_k": draw(st.integers(1, experts)),
        "normalize": draw(st.integers(0, 1)),
        "alpha": _single(draw(st.sampled_from([1.0, 1.702]))),
        "beta": draw(st.sampled_from([0.0, 1.0])),
        "limit": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }
    shapes = {
        name: array.shape for name, array in inputs.items() if name not in ("x", "router_logits") and array is not None
    }
    return Case((Call("MoE", tuple(inputs), ("y",)),), ("y",), inputs, attributes, shapes)


@st.composite
def q_embedding(draw: Any) -> Case:
    """4 and 8 bits, with and without offsets; tokens of a ragged batch, some of them twice."""
    rng = draw(_random())
    bits = draw(st.sampled_from([4, 8]))
    block = draw(st.sampled_from([2, 4, 16, 32] if bits == 4 else [1, 3, 4, 16, 32]))
    rows, blocks = draw(st.sampled_from([1, 5, 33])), draw(st.integers(1, 4))
    inputs = {
        "input_ids": rng.integers(0, rows, (draw(st.integers(1, 3)), draw(st.integers(1, 7)))),
        "codes": _codes(rng, rows, blocks * block, bits),
        "scales": _scales(rng, rows, blocks, bits),
        "offsets": rng.normal(size=(rows, blocks)) if draw(st.booleans()) else None,
    }
    calls = (Call("QEmbedding", tuple(inputs), ("y",)),)
    return Case(calls, ("y",), inputs, {"bits": bits, "block_size": block})


def _codes(rng: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    """(rows, columns * bits / 8) uint8: all values, packed, the first code in the low bits."""
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4


def _scales(rng: np.random.Generator, rows: int, blocks: int, bits: int) -> np.ndarray:
    """Weights of about 1, of either sign."""
    signs = rng.choice([1, -1], (rows, blocks))
    return np.asarray(rng.uniform(0.5, 1.5, (rows, blocks)) / 2 ** (bits - 1) * signs)
