"""`RmsNorm` in ONNX."""

from typing import Any

from onnx.defs import OpSchema
from onnxscript import script

from .marker import PLUGIN_ATTRIBUTES, STANDARD, ZONDA, Marker, like, op_overload

op = STANDARD


@script(ZONDA, default_opset=STANDARD)
def body(x, weight, eps: float):  # type: ignore[no-untyped-def]
    """See `models.ops.rms_norm`."""
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def _translate(x: Any, weight: Any, eps: float) -> Any:
    return ZONDA.RmsNorm(x, weight, eps=eps, **PLUGIN_ATTRIBUTES)


RMS_NORM = Marker(
    name="RmsNorm",
    inputs=[("x", "T"), ("weight", "T")],
    outputs=[("y", "T")],
    attributes={"eps": OpSchema.AttrType.FLOAT},
    infer=like((0, 0)),
    translations={op_overload("rms_norm"): _translate},
    bodies={"": body},
)
