"""`QLinear` in ONNX. Overload `symmetric` has no offsets."""

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(x, codes, scales, offsets, block_size: int):  # type: ignore[no-untyped-def]
    """See `models.ops.q_linear`: the symmetric part, and each block's sum of x times its offset."""
    weight = op.DequantizeLinear(codes, scales, axis=1, block_size=block_size)
    product = op.MatMul(x, op.Transpose(op.CastLike(weight, x), perm=[1, 0]))
    width = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
    leading = op.Shape(x, start=0, end=-1)
    blocks = op.Reshape(x, op.Concat(leading, op.Constant(value_ints=[-1]), width, axis=0))
    sums = op.ReduceSum(blocks, op.Constant(value_ints=[-1]), keepdims=0)
    return op.Add(product, op.MatMul(sums, op.Transpose(op.CastLike(offsets, x), perm=[1, 0])))


@script(ZONDA, default_opset=STANDARD)
def symmetric(x, codes, scales, block_size: int):  # type: ignore[no-untyped-def]
    """The same without offsets."""
    weight = op.DequantizeLinear(codes, scales, axis=1, block_size=block_size)
    return op.MatMul(x, op.Transpose(op.CastLike(weight, x), perm=[1, 0]))


def _translate(x: Any, codes: Any, scales: Any, offsets: Any, bits: int, block_size: int) -> Any:
    inputs = (x, codes, scales) if offsets is None else (x, codes, scales, offsets)
    return ZONDA.QLinear(*inputs, bits=bits, block_size=block_size, **PLUGIN_ATTRIBUTES)


def _infer(context: Any) -> None:
    """(..., N): the last dimension of x replaced by the rows of codes."""
    x, codes = context.get_input_type(0).tensor_type, context.get_input_type(1).tensor_type
    result = onnx.TypeProto()
    result.tensor_type.elem_type = x.elem_type
    if x.HasField("shape") and codes.HasField("shape"):
        result.tensor_type.shape.dim.extend([*x.shape.dim[:-1], codes.shape.dim[0]])
    context.set_output_type(0, result)


Q_LINEAR = Marker(
    name="QLinear",
    inputs=[("x", "T"), ("codes", "Q"), ("scales", "TS"), ("offsets?", "TS")],
    outputs=[("y", "T")],
    attributes={"bits": OpSchema.AttrType.INT, "block_size": OpSchema.AttrType.INT},
    infer=_infer,
    translations={op_overload("q_linear"): _translate},
    bodies={"": body, "symmetric": symmetric},
    select=lambda present: "" if len(present) > 3 and present[3] else "symmetric",
)
