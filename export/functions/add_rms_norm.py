"""`AddRmsNorm` in ONNX: `total = x + residual`, `y = RmsNorm(total)`; made by lowering, so without a body."""

from onnx.defs import OpSchema

from .marker import Marker, like

ADD_RMS_NORM = Marker(
    name="AddRmsNorm",
    inputs=[("x", "T"), ("residual", "T"), ("weight", "TW")],
    outputs=[("y", "T"), ("total", "T")],
    attributes={"eps": OpSchema.AttrType.FLOAT},
    infer=like((0, 0), (1, 0)),
    translations={},
    bodies={},
)
