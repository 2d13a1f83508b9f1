"""`QEmbedding` in ONNX. Overload `symmetric` has no offsets. Codes are packed UINT8, as those of `QLinear`."""

from typing import Any

import onnx
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, op_overload

op = STANDARD
_UINT8 = TensorProto.UINT8


@script(ZONDA, default_opset=STANDARD)
def body(input_ids, codes, scales, offsets, bits: int, block_size: int):  # type: ignore[no-untyped-def]
    """See `models.ops.q_embedding`: gather first, then dequantise only those rows."""
    eight = op.Constant(value_int=8)
    width = op.Constant(value_int=bits)
    spare = op.Cast(op.Sub(eight, width), to=_UINT8)
    mask = op.BitShift(op.Cast(op.Constant(value_int=255), to=_UINT8), spare, direction="RIGHT")
    zero = op.BitShift(op.Cast(op.Constant(value_int=128), to=_UINT8), spare, direction="RIGHT")
    shifts = op.Cast(op.Range(op.Constant(value_int=0), eight, width), to=_UINT8)
    bytes_ = op.Unsqueeze(op.Gather(codes, input_ids, axis=0), op.Constant(value_ints=[-1]))
    unpacked = op.BitwiseAnd(op.BitShift(bytes_, shifts, direction="RIGHT"), mask)
    rows = op.Reshape(unpacked, op.Constant(value_ints=[0, 0, -1]))
    steps = op.Gather(scales, input_ids, axis=0)
    centred = op.DequantizeLinear(rows, steps, op.Expand(zero, op.Shape(steps)), axis=2, block_size=block_size)
    block = op.Reshape(op.Constant(value_int=block_size), op.Constant(value_ints=[1]))
    blocks = op.Reshape(centred, op.Concat(op.Constant(value_ints=[0, 0, -1]), block, axis=0))
    added = op.Add(blocks, op.Unsqueeze(op.Gather(offsets, input_ids, axis=0), op.Constant(value_ints=[-1])))
    return op.Reshape(added, op.Constant(value_ints=[0, 0, -1]))


@script(ZONDA, default_opset=STANDARD)
def symmetric(input_ids, codes, scales, bits: int, block_size: int):  # type: ignore[no-untyped-def]
    """The same without offsets."""
    eight = op.Constant(value_int=8)
    width = op.Constant(value_int=bits)
    spare = op.Cast(op.Sub(eight, width), to=_UINT8)
    mask = op.BitShift(op.Cast(op.Constant(value_int=255), to=_UINT8), spare, direction="RIGHT")
    zero = op.BitShift(op.Cast(op.Constant(value_int=128), to=_UINT8), spare, direction="RIGHT")
    shifts = op.Cast(op.Range(op.Constant(value_int=0), eight, width), to=_UINT8)
    bytes_ = op.Unsqueeze(op.Gather(codes, input_ids, axis=0), op.Constant(value_ints=[-1]))
    unpacked = op.BitwiseAnd(op.BitShift(bytes_, shifts, direction="RIGHT"), mask)
    rows = op.Reshape(unpacked, op.Constant(value_ints=[0, 0, -1]))
    steps = op.Gather(scales, input_ids, axis=0)
    return op.DequantizeLinear(rows, steps, op.Expand(zero, op.Shape(steps)), axis=2, block_size=block_size)


def _translate(input_ids: Any, codes: Any, scales: Any, offsets: Any, bits: int, block_size: int) -> Any:
    inputs = (input_ids, codes, scales) if offsets is None else (input_ids, codes, scales, offsets)
    return ZONDA.QEmbedding(*inputs, bits=bits, block_size=block_size, **PLUGIN_ATTRIBUTES)


def _infer(context: Any) -> None:
    """(B, S, H): the shape of input_ids, and a row's blocks of scales times the block size; type of scales."""
    ids, scales = context.get_input_type(0).tensor_type, context.get_input_type(2).tensor_type
    result = onnx.TypeProto()
    result.tensor_type.elem_type = scales.elem_type
    if ids.HasField("shape") and scales.HasField("shape"):
        result.tensor_type.shape.dim.extend(ids.shape.dim)
        width = result.tensor_type.shape.dim.add()
        if scales.shape.dim[1].HasField("dim_value"):
            width.dim_value = scales.shape.dim[1].dim_value * context.get_attribute("block_size").i
    context.set_output_type(0, result)


Q_EMBEDDING = Marker(
    name="QEmbedding",
    inputs=[("input_ids", "I64"), ("codes", "U8"), ("scales", "TS"), ("offsets?", "TS")],
    outputs=[("embedded", "TS")],
    attributes={"bits": OpSchema.AttrType.INT, "block_size": OpSchema.AttrType.INT},
    infer=_infer,
    translations={op_overload("q_embedding"): _translate},
    bodies={"": body, "symmetric": symmetric},
    select=lambda present: "" if len(present) > 3 and present[3] else "symmetric",
)
