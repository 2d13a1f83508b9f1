"""The conformance matrix: one row a marker, one cell an execution and dtype, and the one check they all go through.

An element passes when |found - wanted| <= eps(dtype)/2 · |wanted| + units · eps(arithmetic) · magnitude. The first term
is the rounding of the result to its dtype, which nobody can avoid. The second is what the arithmetic on the way there
may lose: `wanted` and `magnitude` are float64 (see `references.py`), `arithmetic` is the type in which the execution
computes, and `units` counts that type's roundings; how many a formula makes stands above each row, with the most that
400 cases needed. `test_matrix.py` fails where the error is larger, and where it is twenty times smaller.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from conformance import cases, references
from conformance.cases import DTYPES, Case
from conformance.executions import EXECUTIONS
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.strategies import SearchStrategy

EXAMPLES = 40


@dataclass(frozen=True, slots=True)
class Tolerance:
    """arithmetic: dtype in which the execution computes. units: how many eps of it × magnitude it may lose."""

    arithmetic: str
    units: float


@dataclass(frozen=True, slots=True)
class Excluded:
    """A dtype that an execution cannot do, and the error in which that ends."""

    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Limit:
    """Cases that an execution is known to refuse or to get wrong: left out until it no longer does."""

    reason: str
    applies: Callable[[Case], bool]


@dataclass(frozen=True, slots=True)
class Row:
    """One marker, or a group of operators that a lowering fuses.

    markers: what the cases are made of, besides ONNX's Add.
    cells: execution -> dtype -> how near it comes, or why it cannot.
    lowers_to: a case -> the fused operators and the markers that its lowered graph has.
    limits: execution -> cases left out.
    """

    name: str
    markers: tuple[str, ...]
    cases: SearchStrategy[Case]
    reference: Callable[..., references.Reference]
    cells: Mapping[str, Mapping[str, Tolerance | Excluded]]
    lowers_to: Callable[[Case], set[str]]
    limits: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)


def _by_dtype(*cells: Tolerance | Excluded) -> dict[str, Tolerance | Excluded]:
    return dict(zip(DTYPES, cells, strict=True))


f64, f32, f16, bf16 = (functools.partial(Tolerance, dtype) for dtype in DTYPES)

NO_BFLOAT16 = Excluded("ONNX Runtime's CPU has next to no bfloat16", "NOT_IMPLEMENTED|Numpy_type|bound to different")
NOT_FED = Excluded("ONNX Runtime takes no bfloat16 arrays of numpy", "Numpy_type")
NO_FLOAT64 = Excluded("neither RotaryEmbedding nor the fused operators know float64", r"tensor\(double\)")
NO_FLOAT64_MOE = Excluded("ONNX Runtime's MoE has no float64", r"tensor\(double\)")
SQUARES_IN_16_BITS = Excluded("onnx.reference squares x in float16: 300² overflows", "differs")
ROWS_OF_FLOAT32 = Excluded("scales are float32 at most, and the rows are of their type", "float32 instead of float64")
TABLES_STAY_FLOAT32 = Excluded("GroupQueryAttention wants cos and sin of the type of q", "bound to different types")


def _float16_scales(case: Case) -> bool:
    x, scales = case.inputs["x"], case.inputs["scales"]
    return scales.dtype == np.float16 and x.dtype.itemsize > 2


ROUNDED_BY_SCALES = (
    Limit(
        "DequantizeLinear answers in the type of the scales: float16 scales round the weight of a wider x",
        _float16_scales,
    ),
)


def _head_dims(case: Case) -> tuple[int, int, int]:
    """(D of keys, D of values, rotated pairs)."""
    return case.inputs["past_key"].shape[3], case.inputs["past_value"].shape[3], case.inputs["cos"].shape[1]


def _attention_lowers_to(case: Case) -> set[str]:
    """GroupQueryAttention takes one head_dim, a multiple of 8; it rotates if that is one of 16 and the pairs are of 8."""
    key_dim, value_dim, pairs = _head_dims(case)
    if key_dim != value_dim or key_dim % 8:
        return {"RoPE", "KvCacheUpdate", "CachedAttention"}
    if key_dim % 16 or pairs % 8:
        return {"RoPE", "GroupQueryAttention"}
    return {"GroupQueryAttention"}


ROWS: tuple[Row, ...] = (
    # A sum of up to 257 squares in lanes of 4 or more (half of its error survives the root), mean, root, quotient, two
    # products: 6 eps. The most: 1.6 in float32, 3.6 in float64 with its fewer lanes. The evaluator adds bfloat16
    # numbers one by one: 16, the most is 9.7.
    Row(
        "RmsNorm",
        ("RmsNorm",),
        cases.rms_norm(),
        references.rms_norm,
        {
            "eager": _by_dtype(f64(6), f32(6), f32(6), f32(6)),
            "onnxruntime-body": _by_dtype(f64(6), f32(6), f32(6), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f64(6), f32(6), SQUARES_IN_16_BITS, bf16(16)),
            "onnxruntime-lowering": _by_dtype(f64(6), f32(6), f32(6), NO_BFLOAT16),
        },
        lambda _: {"SimplifiedLayerNormalization"},
    ),
    # The same of a sum. Unfused, the norm sees the sum as rounded to the dtype: half an eps of that in x and half in
    # the root, 1 in all; the most is 0.72. Fused, it sees it in float32: the most is 2.8 in float32, 0 in float16.
    Row(
        "AddRmsNorm",
        ("RmsNorm",),
        cases.add_rms_norm(),
        references.add_rms_norm,
        {
            "eager": _by_dtype(f64(6), f32(6), f16(1), bf16(1)),
            "onnxruntime-body": _by_dtype(f64(6), f32(6), f16(1), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f64(6), f32(6), SQUARES_IN_16_BITS, bf16(16)),
            "onnxruntime-lowering": _by_dtype(NO_FLOAT64, f32(6), f16(1), NO_BFLOAT16),
        },
        lambda case: (
            {"SkipSimplifiedLayerNormalization"}
            if case.inputs["x"].ndim in (2, 3)
            else {"SimplifiedLayerNormalization"}
        ),
    ),
    # The same with a gain that is a product, in the type of the scales: a float64 x gets a float32 gain (the most: 0.5).
    # In the body the gain is rounded to the type of x: half an eps of it (0.46), and nothing else counts beside that.
    Row(
        "QRmsNorm",
        ("QRmsNorm",),
        cases.q_rms_norm(),
        references.q_rms_norm,
        {
            "eager": _by_dtype(f32(1), f32(6), f32(6), f32(6)),
            "onnxruntime-body": _by_dtype(f32(1), f32(6), f16(0.6), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f32(1), f32(6), SQUARES_IN_16_BITS, bf16(16)),
            "onnxruntime-lowering": _by_dtype(f32(1), f32(6), f16(0.6), NO_BFLOAT16),
        },
        lambda _: {"SimplifiedLayerNormalization"},
        dict.fromkeys(("onnxruntime-body", "onnx-evaluator", "onnxruntime-lowering"), ROUNDED_BY_SCALES),
    ),
    # Two products of half an eps, and if the tables are rounded first as well, twice that; the sum's own rounding is the
    # result's. The most: 0.45 in float32, 0.8 in 16 bits.
    *(
        Row(
            name,
            ("RoPE",),
            cases.rope(single=single),
            references.rope,
            {
                "eager": _by_dtype(f64(1.05), f32(1.05), f32(1.05), f32(1.05)),
                "onnxruntime-body": _by_dtype(NO_FLOAT64, f32(1.05), f16(1.05), NO_BFLOAT16),
                "onnx-evaluator": _by_dtype(f64(1.05), f32(1.05), f16(1.05), bf16(1.05)),
                "onnxruntime-lowering": _by_dtype(NO_FLOAT64, f32(1.05), f16(1.05), NO_BFLOAT16),
            },
            lambda _: {"RoPE"},
        )
        for name, single in (("RoPE", False), ("RoPE without k", True))
    ),
    # Copies: exact. Compared at positions < offset + length: engines may write beyond.
    Row(
        "KvCacheUpdate",
        ("KvCacheUpdate",),
        cases.kv_cache_update(),
        references.kv_cache_update,
        {
            "eager": _by_dtype(f64(0), f32(0), f16(0), bf16(0)),
            "onnxruntime-body": _by_dtype(f64(0), f32(0), f16(0), NOT_FED),
            "onnx-evaluator": _by_dtype(f64(0), f32(0), f16(0), bf16(0)),
            "onnxruntime-lowering": _by_dtype(f64(0), f32(0), f16(0), NOT_FED),
        },
        lambda _: {"KvCacheUpdate"},
    ),
    # Two dot products, scale, exponential, sum, quotient, each an eps of a term of the magnitude at most: 3. The most:
    # 0.84 in float32, 2.1 in float64 (a less exact exponential), 0.6 in 16 bits. The standard's Attention multiplies
    # by a root of the scale, which is a float32 attribute: in float64 the bodies are as exact as that (0.22).
    Row(
        "CachedAttention",
        ("CachedAttention",),
        cases.cached_attention(),
        references.cached_attention,
        {
            "eager": _by_dtype(f64(3), f32(3), f32(3), f32(3)),
            "onnxruntime-body": _by_dtype(f32(1), f32(3), f16(1), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f32(1), f32(3), f16(1.5), bf16(1.5)),
            "onnxruntime-lowering": _by_dtype(f32(1), f32(3), f16(1), NO_BFLOAT16),
        },
        lambda _: {"CachedAttention"},
    ),
    # The present key has the error of RoPE and its tolerance. Attention adds up the errors of its inputs with its own,
    # and its magnitude with theirs: the most is 0.57. Between two ops eager rounds to the dtype (0.14).
    Row(
        "RoPE + KvCacheUpdate + CachedAttention",
        ("RoPE", "KvCacheUpdate", "CachedAttention"),
        cases.rope_kv_cache_attention(),
        references.rope_kv_cache_attention,
        {
            "eager": _by_dtype(f64(1.5), f32(1.5), f16(0.5), bf16(0.5)),
            "onnxruntime-body": _by_dtype(NO_FLOAT64, f32(1.5), f16(1.05), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f32(1), f32(1.5), f16(1.05), bf16(1.05)),
            "onnxruntime-lowering": _by_dtype(NO_FLOAT64, f32(1.5), TABLES_STAY_FLOAT32, NO_BFLOAT16),
        },
        _attention_lowers_to,
    ),
    # Weight: a product and a sum; a dot product of up to 128 terms in lanes: 3. The most is 1.3. The float32 scales make
    # a float32 weight for a float64 x (0.61). In the bodies the weight is rounded to 16 bits, then multiplied in float32
    # on ONNX Runtime (0.35), in 16 bits by the evaluator (0.81).
    Row(
        "QLinear",
        ("QLinear",),
        cases.q_linear(),
        references.q_linear,
        {
            "eager": _by_dtype(f32(1), f32(3), f32(3), f32(3)),
            "onnxruntime-body": _by_dtype(f32(1), f32(3), f16(1), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f32(1), f32(3), f16(1), bf16(1.5)),
            "onnxruntime-lowering": _by_dtype(f32(1), f32(3), f16(1), NO_BFLOAT16),
        },
        lambda _: {"QLinear"},
        dict.fromkeys(("onnxruntime-body", "onnx-evaluator", "onnxruntime-lowering"), ROUNDED_BY_SCALES),
    ),
    # Two dot products of up to 33 terms in lanes, the sigmoid and its slope, the exponential of a score, a sum over
    # experts, each half an eps of a term of the magnitude or less: 2. The most: 0.92 in float32, 1.05 in float64. In 16
    # bits every step of a body is rounded, but seldom all the same way: 0.47.
    Row(
        "MoE",
        ("MoE",),
        cases.moe(),
        references.moe,
        {
            "eager": _by_dtype(f64(2), f32(2), f32(2), f32(2)),
            "onnxruntime-body": _by_dtype(f64(2), f32(2), f16(1), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(f64(2), f32(2), f16(1), bf16(1)),
            "onnxruntime-lowering": _by_dtype(NO_FLOAT64_MOE, f32(2), f16(1), NO_BFLOAT16),
        },
        lambda _: {"com.microsoft.MoE"},
    ),
    # A product and a sum, each rounded to the type of the scales.
    Row(
        "QEmbedding",
        ("QEmbedding",),
        cases.q_embedding(),
        references.q_embedding,
        {
            "eager": _by_dtype(ROWS_OF_FLOAT32, f32(1), f32(1), f32(1)),
            "onnxruntime-body": _by_dtype(ROWS_OF_FLOAT32, f32(1), f16(1), NO_BFLOAT16),
            "onnx-evaluator": _by_dtype(ROWS_OF_FLOAT32, f32(1), f16(1), bf16(1)),
            "onnxruntime-lowering": _by_dtype(ROWS_OF_FLOAT32, f32(1), f16(1), NO_BFLOAT16),
        },
        lambda _: {"QEmbedding"},
    ),
)
"""The table. A further execution is an entry in `executions.EXECUTIONS` and a line in each row."""

BY_NAME = {row.name: row for row in ROWS}


def check(row: Row, execution: str, dtype: str, case: Case) -> float:
    """Run one case; return the largest error as a share of what is allowed.

    Raises:
        AssertionError: a result has another dtype or shape than it should, or differs by more than the tolerance.
    """
    typed, wanted = _reference(row.name, dtype, case)
    found = EXECUTIONS[execution](typed)
    cell = row.cells[execution][dtype]
    tolerance = cell if isinstance(cell, Tolerance) else Tolerance(dtype, 16)
    assert found.keys() == wanted.keys()
    return max(_share(name, found[name], wanted[name], dtype, tolerance) for name in wanted)


@functools.lru_cache(maxsize=2048)
def _reference(row: str, dtype: str, case: Case) -> tuple[Case, references.Reference]:
    """The case in its dtype and what is right; remembered for `drawn` cases, which come again in every test."""
    typed = case.of(dtype)
    return typed, BY_NAME[row].reference(typed.widened(), typed.attributes)


def _share(name: str, found: np.ndarray, wanted: references.Expected, dtype: str, tolerance: Tolerance) -> float:
    assert found.dtype == DTYPES[dtype], f"{name} is {found.dtype} instead of {dtype}"
    assert found.shape == wanted.value.shape, f"{name} is {found.shape} instead of {wanted.value.shape}"
    compared = np.ones(found.shape, bool) if wanted.compared is None else wanted.compared
    value, magnitude = wanted.value[compared], wanted.magnitude[compared]
    error = np.abs(found[compared].astype(np.float64) - value)
    result, arithmetic = (ml_dtypes.finfo(DTYPES[d]) for d in (dtype, tolerance.arithmetic))
    rounding = float(result.eps) / 2 * np.abs(value) + float(result.smallest_subnormal)
    allowed = np.where(magnitude > 0, rounding + tolerance.units * float(arithmetic.eps) * magnitude, 0)
    wrong = ~(error <= allowed)  # a NaN is wrong
    if wrong.any():
        worst = np.argmax(np.where(wrong, np.where(np.isnan(error), np.inf, error - allowed), -np.inf))
        raise AssertionError(
            f"{name} differs in {wrong.sum()} of {wrong.size}: {found[compared][worst]} instead of {value[worst]}, "
            f"{error[worst]:.3g} away where {allowed[worst]:.3g} is allowed"
        )
    return float(np.max(error[magnitude > 0] / allowed[magnitude > 0], initial=0))


def conform(row: Row, execution: str, dtype: str, *, examples: int = EXAMPLES, shrink: bool = True) -> float:
    """Draw cases and check each, but those that a limit leaves out; return the largest share of the tolerance used."""
    largest = 0.0

    @settings(_settings(examples), phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate])
    @given(row.cases)
    def run(case: Case) -> None:
        nonlocal largest
        assume(not any(limit.applies(case.of(dtype)) for limit in row.limits.get(execution, ())))
        largest = max(largest, check(row, execution, dtype, case))

    run()
    return largest


@functools.lru_cache
def drawn(name: str) -> tuple[Case, ...]:
    """The cases of a row as a list, for questions about all of them."""
    found: list[Case] = []

    @settings(_settings(2 * EXAMPLES), phases=[Phase.generate])
    @given(BY_NAME[name].cases)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return tuple(found)


def _settings(examples: int) -> settings:
    """The same cases in every run, on machines of any speed."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def unrowed(markers: Iterable[str], rows: Iterable[Row] = ROWS) -> set[str]:
    """Markers without a row of their own."""
    return set(markers) - {row.markers[0] for row in rows if len(row.markers) == 1}
