"""`QRmsNorm` in ONNX."""

from typing import Any

from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, like, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(x, codes, scales, eps: float):  # type: ignore[no-untyped-def]
    """See `models.ops.q_rms_norm`. TensorRT wants DequantizeLinear straight on the INT8 constant, then the reshape."""
    gain = op.Reshape(op.DequantizeLinear(codes, scales, axis=0), op.Constant(value_ints=[-1]))
    return op.RMSNormalization(x, op.CastLike(gain, x), axis=-1, epsilon=eps)


def _translate(x: Any, codes: Any, scales: Any, eps: float) -> Any:
    return ZONDA.QRmsNorm(x, codes, scales, eps=eps, **PLUGIN_ATTRIBUTES)


Q_RMS_NORM = Marker(
    name="QRmsNorm",
    inputs=[("x", "T"), ("codes", "I8"), ("scales", "TS")],
    outputs=[("y", "T")],
    attributes={"eps": OpSchema.AttrType.FLOAT},
    infer=like((0, 0)),
    translations={op_overload("q_rms_norm"): _translate},
    bodies={"": body},
)
