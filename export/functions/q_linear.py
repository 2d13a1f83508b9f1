"""`QLinear` in ONNX. Overload `symmetric` has no offsets.

Codes are packed UINT8, the bytes of `models.ops.blocks`: MatMulNBits and GatherBlockQuantized read the same ones, and a
table that a head and an embedding share is one initialiser (ONNX gathers no UINT4). The bodies unpack them for any
width that divides 8.
"""

from typing import Any

import onnx
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, op_overload

op = STANDARD
_UINT8 = TensorProto.UINT8


@script(ZONDA, default_opset=STANDARD)
def body(x, codes, scales, offsets, bits: int, block_size: int):  # type: ignore[no-untyped-def]
    """See `models.ops.q_linear`: the symmetric part, and each block's sum of x times its offset."""
    eight = op.Constant(value_int=8)
    width = op.Constant(value_int=bits)
    spare = op.Cast(op.Sub(eight, width), to=_UINT8)
    mask = op.BitShift(op.Cast(op.Constant(value_int=255), to=_UINT8), spare, direction="RIGHT")
    zero = op.BitShift(op.Cast(op.Constant(value_int=128), to=_UINT8), spare, direction="RIGHT")
    shifts = op.Cast(op.Range(op.Constant(value_int=0), eight, width), to=_UINT8)
    bytes_ = op.Unsqueeze(codes, op.Constant(value_ints=[-1]))
    unpacked = op.BitwiseAnd(op.BitShift(bytes_, shifts, direction="RIGHT"), mask)
    rows = op.Reshape(unpacked, op.Constant(value_ints=[0, -1]))
    zeros = op.Expand(zero, op.Shape(scales))
    weight = op.DequantizeLinear(rows, scales, zeros, axis=1, block_size=block_size)
    product = op.MatMul(x, op.Transpose(op.CastLike(weight, x), perm=[1, 0]))
    block = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
    leading = op.Shape(x, start=0, end=-1)
    blocks = op.Reshape(x, op.Concat(leading, op.Constant(value_ints=[-1]), block, axis=0))
    sums = op.ReduceSum(blocks, op.Constant(value_ints=[-1]), keepdims=0)
    return op.Add(product, op.MatMul(sums, op.Transpose(op.CastLike(offsets, x), perm=[1, 0])))


@script(ZONDA, default_opset=STANDARD)
def symmetric(x, codes, scales, bits: int, block_size: int):  # type: ignore[no-untyped-def]
    """The same without offsets."""
    eight = op.Constant(value_int=8)
    width = op.Constant(value_int=bits)
    spare = op.Cast(op.Sub(eight, width), to=_UINT8)
    mask = op.BitShift(op.Cast(op.Constant(value_int=255), to=_UINT8), spare, direction="RIGHT")
    zero = op.BitShift(op.Cast(op.Constant(value_int=128), to=_UINT8), spare, direction="RIGHT")
    shifts = op.Cast(op.Range(op.Constant(value_int=0), eight, width), to=_UINT8)
    bytes_ = op.Unsqueeze(codes, op.Constant(value_ints=[-1]))
    unpacked = op.BitwiseAnd(op.BitShift(bytes_, shifts, direction="RIGHT"), mask)
    rows = op.Reshape(unpacked, op.Constant(value_ints=[0, -1]))
    zeros = op.Expand(zero, op.Shape(scales))
    weight = op.DequantizeLinear(rows, scales, zeros, axis=1, block_size=block_size)
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
    inputs=[("x", "T"), ("codes", "U8"), ("scales", "TS"), ("offsets?", "TS")],
    outputs=[("y", "T")],
    attributes={"bits": OpSchema.AttrType.INT, "block_size": OpSchema.AttrType.INT},
    infer=_infer,
    translations={op_overload("q_linear"): _translate},
    bodies={"": body, "symmetric": symmetric},
    select=lambda present: "" if len(present) > 3 and present[3] else "symmetric",
)
