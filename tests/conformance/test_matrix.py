"""Every marker means the same in every execution: the matrix, and that it is whole, used and tight."""

import pytest
import torch
from conformance import executions
from conformance.cases import DTYPES
from conformance.executions import EXECUTIONS
from conformance.matrix import BY_NAME, ROWS, Excluded, Tolerance, check, conform, drawn, unrowed
from torch.utils._python_dispatch import TorchDispatchMode

from zonda.export.functions import MARKERS

CELLS = [(r.name, e, d, cell) for r in ROWS for e, dtypes in r.cells.items() for d, cell in dtypes.items()]
HELD = [pytest.param(*c[:3], id="-".join(c[:3])) for c in CELLS if isinstance(c[3], Tolerance)]
EXCLUDED = [pytest.param(*c, id="-".join(c[:3])) for c in CELLS if isinstance(c[3], Excluded)]
LIMITS = [
    pytest.param(row.name, execution, limit, id=f"{row.name}-{execution}-{index}")
    for row in ROWS
    for execution, limits in row.limits.items()
    for index, limit in enumerate(limits)
]


@pytest.mark.parametrize(("row", "execution", "dtype"), HELD)
def test_equals_the_float64_reference_within_a_tight_tolerance(row, execution, dtype):
    """Tight: the drawn cases use a twentieth of it at least. Not asked of float64, where both may round alike."""
    used = conform(BY_NAME[row], execution, dtype)
    copied = BY_NAME[row].cells[execution][dtype].units == 0
    assert copied or dtype == "float64" or used > 1 / 20, f"only {used:.3f} of the tolerance is used: it hides errors"


@pytest.mark.parametrize(("row", "execution", "dtype", "cell"), EXCLUDED)
def test_what_is_excluded_cannot_be_done(row, execution, dtype, cell):
    """The day this fails, the cell gets a tolerance."""
    with pytest.raises(Exception, match=cell.error):
        conform(BY_NAME[row], execution, dtype, shrink=False)


@pytest.mark.parametrize(("row", "execution", "limit"), LIMITS)
def test_what_is_left_out_still_fails(row, execution, limit):
    """The day this fails, the limit goes, and the matrix covers these cases."""
    left_out = [case for case in drawn(row) if limit.applies(case.of("float32"))]
    assert left_out
    failed = 0
    for case in left_out:
        try:
            check(BY_NAME[row], execution, "float32", case)
        except Exception:
            failed += 1
    assert failed, limit.reason


def test_every_marker_has_a_row():
    assert not unrowed(marker.name for marker in MARKERS)


def test_a_new_marker_without_a_row_is_noticed():
    assert unrowed([*(marker.name for marker in MARKERS), "Nonesuch"]) == {"Nonesuch"}
    for marker in MARKERS:
        others = [row for row in ROWS if row.markers != (marker.name,)]
        assert unrowed([marker.name], others) == {marker.name}


@pytest.mark.parametrize("row", BY_NAME)
def test_every_row_has_every_execution_and_dtype(row):
    assert BY_NAME[row].cells.keys() == EXECUTIONS.keys()
    for execution, cells in BY_NAME[row].cells.items():
        assert cells.keys() == DTYPES.keys(), execution


@pytest.mark.parametrize("execution", ["eager", "onnxruntime-body", "onnx-evaluator", "onnxruntime-lowering"])
@pytest.mark.parametrize("row", BY_NAME)
def test_every_marker_runs_in_float32_wherever_no_plugin_is_needed(row, execution):
    assert isinstance(BY_NAME[row].cells[execution]["float32"], Tolerance)


@pytest.mark.parametrize("row", BY_NAME)
def test_a_row_is_about_its_markers_and_sets_all_their_attributes(row):
    for case in drawn(row):
        used = [call.operator for call in case.calls if call.operator != "Add"]
        assert set(used) == set(BY_NAME[row].markers)
        wanted = {name for operator in used for name in executions.BY_NAME[operator].attributes}
        assert case.attributes.keys() == wanted


def test_every_body_is_executed():
    """One for each combination of inputs that a marker knows."""
    used = {
        (function.name, function.overload)
        for row in BY_NAME
        for case in drawn(row)
        for function in executions.universal(case.of("float32")).functions
    }
    assert used == {(marker.name, overload) for marker in MARKERS for overload in marker.bodies}


def test_every_torch_op_is_executed():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.name())
            return func(*args, **(kwargs or {}))

    called = set()
    with Recorder():
        for row in BY_NAME:
            for case in drawn(row):
                executions.eager(case.of("float32"))
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zonda::")}
    assert {name for name in called if name.startswith("zonda::")} == registered


@pytest.mark.parametrize("row", BY_NAME)
def test_the_lowering_fuses_what_fits_and_leaves_the_rest_its_body(row):
    limits = BY_NAME[row].limits.get("onnxruntime-lowering", ())
    for case in drawn(row):
        typed = case.of("float32")
        if not any(limit.applies(typed) for limit in limits):
            graph = executions.lowered(typed).graph
            assert {executions.operator_of(node) for node in graph.node} & OPERATORS == BY_NAME[row].lowers_to(typed)


OPERATORS = {
    *(marker.name for marker in MARKERS),
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "GroupQueryAttention",
    "com.microsoft.MoE",
}
"""Markers and what they fuse to; the arithmetic of row lengths around them has no row."""
