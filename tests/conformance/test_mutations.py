"""The matrix sees what is wrong: an implementation that answers zeros or its input, an input or attribute ignored.

An implementation is replaced where it lives: the torch op of an operator, the body in the marker's registry, the fused
node in the lowered graph. The check is the one of `test_matrix.py`, in the coarsest dtype that the execution has.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conformance import executions
from conformance.cases import DTYPES, Case
from conformance.matrix import BY_NAME, ROWS, Row, Tolerance, check, conform, drawn
from onnx import helper

EXAMPLES = 25

IDLE_INPUT = {
    ("QEmbedding", 0): 2,
    ("RoPE", 1): 1,
    ("GroupQueryAttention", 1): 3,
    ("GroupQueryAttention", 2): 4,
}
"""(operator, output) -> the input that the output would be if nothing were done; the first where it is not said."""

OUTPUTS = {
    "RoPE": lambda case: (0,) if case.inputs["k"] is None else (0, 1),
    "SkipSimplifiedLayerNormalization": lambda _: (0, 3),
    "GroupQueryAttention": lambda _: (0, 1, 2),
}
"""Operator -> its outputs in a case; one where it is not said."""


def coarsest(row: Row, execution: str) -> str:
    return [dtype for dtype in DTYPES if isinstance(row.cells[execution][dtype], Tolerance)][-1]


def implementations(row: Row, execution: str) -> set[tuple[str, int]]:
    """(operator, output) of all that computes something in the drawn cases, as this execution runs them."""
    found = set()
    for case in drawn(row.name):
        typed = case.of(coarsest(row, execution))
        limits = row.limits.get(execution, ())
        if not any(limit.applies(typed) for limit in limits):
            used = row.lowers_to(typed) if execution == "onnxruntime-lowering" else set(row.markers)
            found |= {(name, output) for name in used for output in OUTPUTS.get(name, lambda _: (0,))(typed)}
    return found


CELLS = [
    pytest.param(row.name, execution, mutation, id=f"{row.name}-{execution}-{mutation}")
    for row in ROWS
    for execution, cells in row.cells.items()
    if any(isinstance(cell, Tolerance) for cell in cells.values())
    for mutation in ("zero", "identity")
]


@pytest.mark.parametrize(("row", "execution", "mutation"), CELLS)
def test_an_implementation_that_answers_zeros_or_its_input_fails(row, execution, mutation):
    row = BY_NAME[row]
    dtype = coarsest(row, execution)
    conform(row, execution, dtype, examples=EXAMPLES, shrink=False)
    replaced = implementations(row, execution)
    assert replaced
    for operator, output in sorted(replaced):
        with pytest.MonkeyPatch.context() as patch:
            break_implementation(patch, execution, operator, output, mutation)
            with pytest.raises(AssertionError, match="differs"):
                conform(row, execution, dtype, examples=EXAMPLES, shrink=False)


def break_implementation(patch: pytest.MonkeyPatch, execution: str, operator: str, output: int, mutation: str) -> None:
    """Replace one output of one implementation, for as long as `patch` lives."""
    idle = IDLE_INPUT.get((operator, output), 0)
    if execution == "eager":
        patch.setitem(executions.EAGER, operator, _BrokenOp(executions.EAGER[operator], output, mutation, idle))
    elif operator in executions.BY_NAME:
        bodies = executions.BY_NAME[operator].bodies
        for overload, body in list(bodies.items()):
            patch.setitem(bodies, overload, _BrokenBody(body, output, mutation, idle))
    else:
        patch.setattr(executions, "lowered", _BrokenLowering(executions.lowered, operator, output, mutation, idle))


class _BrokenOp:
    def __init__(self, op, output: int, mutation: str, idle: int) -> None:
        self.op, self.output, self.mutation, self.idle = op, output, mutation, idle

    def __call__(self, inputs, attributes):
        outputs = list(self.op(inputs, attributes))
        if self.output < len(outputs):
            right = outputs[self.output]
            outputs[self.output] = torch.zeros_like(right) if self.mutation == "zero" else fit(inputs[self.idle], right)
        return outputs


def fit(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The numbers of `tensor` in the shape of `like`, cut off or repeated where there are too many or too few."""
    index = torch.arange(like.numel()) % tensor.numel()
    return tensor.flatten()[index].reshape(like.shape)


class _BrokenBody:
    """A marker's body, one of whose outputs is replaced behind it."""

    def __init__(self, body, output: int, mutation: str, idle: int) -> None:
        self.body, self.output, self.mutation, self.idle = body, output, mutation, idle

    def to_function_proto(self) -> onnx.FunctionProto:
        function = self.body.to_function_proto()
        if self.output < len(function.output):
            name = function.output[self.output]
            producer = next(node for node in function.node if name in node.output)
            _replace_output(function.node, producer, name, self.mutation, function.input[self.idle])
        return function


class _BrokenLowering:
    """`executions.lowered`, with one output of each of its `operator` nodes replaced."""

    def __init__(self, lowered, operator: str, output: int, mutation: str, idle: int) -> None:
        self.lowered, self.operator = lowered, operator
        self.output, self.mutation, self.idle = output, mutation, idle

    def __call__(self, case: Case) -> onnx.ModelProto:
        model = self.lowered(case)
        for node in list(model.graph.node):
            if executions.operator_of(node) == self.operator:
                name, source = node.output[self.output], node.input[self.idle]
                _replace_output(model.graph.node, node, name, self.mutation, source)
        return model


def _replace_output(nodes, producer: onnx.NodeProto, name: str, mutation: str, source: str) -> None:
    """Let `name` be zeros, or the numbers of `source`, in the shape and type of what the producer made."""
    right = f"{name}_right"
    kept = [right if output == name else output for output in producer.output]
    position = list(nodes).index(producer)
    del producer.output[:]
    producer.output.extend(kept)
    following = list(nodes)[position + 1 :]
    del nodes[position + 1 :]
    nodes.extend(_zeros(right, name) if mutation == "zero" else _identity(source, right, name))
    nodes.extend(following)


def _zeros(right: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", [right], [f"{name}_shape"]),
        helper.make_node("ConstantOfShape", [f"{name}_shape"], [f"{name}_zeros"]),
        helper.make_node("CastLike", [f"{name}_zeros", right], [name]),
    ]


def _identity(source: str, right: str, name: str) -> list[onnx.NodeProto]:
    """`fit` in ONNX."""
    return [
        helper.make_node("Constant", [], [f"{name}_flat"], value_ints=[-1]),
        helper.make_node("Constant", [], [f"{name}_0"], value_int=0),
        helper.make_node("Constant", [], [f"{name}_1"], value_int=1),
        helper.make_node("Size", [source], [f"{name}_source_size"]),
        helper.make_node("Size", [right], [f"{name}_size"]),
        helper.make_node("Range", [f"{name}_0", f"{name}_size", f"{name}_1"], [f"{name}_steps"]),
        helper.make_node("Mod", [f"{name}_steps", f"{name}_source_size"], [f"{name}_index"]),
        helper.make_node("Reshape", [source, f"{name}_flat"], [f"{name}_source"]),
        helper.make_node("Gather", [f"{name}_source", f"{name}_index"], [f"{name}_numbers"]),
        helper.make_node("Shape", [right], [f"{name}_shape"]),
        helper.make_node("Reshape", [f"{name}_numbers", f"{name}_shape"], [name]),
    ]


def another(name: str, array: np.ndarray) -> np.ndarray:
    """An input that is slightly wrong: numbers off by a hundredth, codes by a bit, positions and offsets by one."""
    if array.dtype.kind == "f":
        return array * (1 + 0.01 * (-1.0) ** np.arange(array.size).reshape(array.shape)).astype(array.dtype)
    if name == "codes":
        return array ^ 1
    return np.maximum(array - 1, 0)


ANOTHER_ATTRIBUTE = {
    "alpha": lambda alpha: 1.01 * alpha,
    "beta": lambda beta: beta + 0.01,
    "eps": lambda eps: 2 * eps,
    "interleaved": lambda interleaved: 1 - interleaved,
    "limit": lambda limit: 0.99 * limit,
    "normalize": lambda normalize: 1 - normalize,
    "scale": lambda scale: 1.01 * scale,
    "softcap": lambda softcap: 1.01 * softcap,
    "top_k": lambda top_k: max(1, top_k - 1),
    "window": lambda window: window + 1,
}
"""All that do not follow from the shapes of the inputs."""

PARTS = [
    pytest.param(row.name, name, id=f"{row.name}-{name}")
    for row in ROWS
    for name in sorted({part for case in drawn(row.name) for part in (*case.inputs, *case.attributes)})
    if (name in ANOTHER_ATTRIBUTE or any(case.inputs.get(name) is not None for case in drawn(row.name)))
    and name != "input_lens"  # says what is compared; no marker reads it
]


@pytest.mark.parametrize(("row", "part"), PARTS)
def test_every_input_and_attribute_counts(row, part, monkeypatch):
    """With one part slightly wrong eager no longer conforms: the cases are not blind to it."""
    monkeypatch.setitem(executions.EXECUTIONS, "eager", lambda case: executions.eager(_altered(case, part)))
    seen = 0
    for case in drawn(row):
        try:
            check(BY_NAME[row], "eager", "float32", case)
        except AssertionError:
            seen += 1
    assert seen >= 3, f"{seen} of {len(drawn(row))} cases see that {part} is wrong"


def _altered(case: Case, part: str) -> Case:
    if part in ANOTHER_ATTRIBUTE:
        return replace(case, attributes={**case.attributes, part: ANOTHER_ATTRIBUTE[part](case.attributes[part])})
    array = case.inputs[part]
    return case if array is None else replace(case, inputs={**case.inputs, part: another(part, array)})
