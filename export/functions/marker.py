"""What a marker is to ONNX: name, schema, translation, bodies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import OnnxFunction
from onnxscript.values import Opset

from ...models import ops  # noqa: F401  (registers torch.ops.zonda)

DOMAIN = "zonda"
VERSION = 1

STANDARD = Opset("", 24)
ZONDA = Opset(DOMAIN, VERSION)

# TensorRT looks a plugin up by these; every other runtime ignores them.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
_TYPE_VARIABLES = {
    "T": _FLOATS,
    "TP": ["tensor(float)"],
    "TS": _FLOATS,
    "TW": _FLOATS,
    "I32": ["tensor(int32)"],
    "I64": ["tensor(int64)"],
    "I8": ["tensor(int8)"],
    "U8": ["tensor(uint8)"],
}

InferShapes = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Marker:
    """One marker.

    name: operator type in the domain `zonda`.
    inputs: (name, type variable) in order; a name that ends in `?` may be absent.
    outputs: likewise.
    attributes: name -> type.
    infer: sets the outputs' types and shapes from an `onnx.shape_inference.InferenceContext`.
    translations: torch overload -> function that emits one node (through `onnxscript`).
    bodies: overload name -> function; "" is the common variant. A body cannot test for absent inputs, so each
        combination of present inputs is an overload of its own.
    select: a node's input presence -> its overload.
    """

    name: str
    inputs: Sequence[tuple[str, str]]
    outputs: Sequence[tuple[str, str]]
    attributes: Mapping[str, OpSchema.AttrType]
    infer: InferShapes
    translations: Mapping[Any, Callable[..., Any]]
    bodies: Mapping[str, OnnxFunction[Any, Any]]
    select: Callable[[Sequence[bool]], str] = lambda _: ""

    def schema(self) -> OpSchema:
        """The ONNX schema, with type and shape inference."""
        attributes = {**self.attributes, **dict.fromkeys(PLUGIN_ATTRIBUTES, OpSchema.AttrType.STRING)}
        used = sorted({variable for _, variable in (*self.inputs, *self.outputs)})
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            inputs=[_parameter(*entry) for entry in self.inputs],
            outputs=[_parameter(*entry) for entry in self.outputs],
            type_constraints=[(v, _TYPE_VARIABLES[v], "") for v in used],
            attributes=[
                OpSchema.Attribute(n, kind, "", required=n not in PLUGIN_ATTRIBUTES) for n, kind in attributes.items()
            ],
        )


def register_schemas(markers: Sequence[Marker]) -> None:
    """Make the markers known to onnx in this process, once; the checker and shape inference then understand them."""
    for marker in markers:
        if not onnx.defs.has(marker.name, DOMAIN):
            schema = marker.schema()
            schema.set_type_and_shape_inference_function(marker.infer)
            onnx.defs.register_schema(schema)


def like(*pairs: tuple[int, int]) -> InferShapes:
    """Inference by copying: output i has the type and shape of input j, for each (i, j) with j present."""

    def infer(context: Any) -> None:
        for output, source in pairs:
            if output < context.get_num_outputs() and source < context.get_num_inputs():
                kind = context.get_input_type(source)
                if kind is not None:
                    context.set_output_type(output, kind)

    return infer


def op_overload(name: str) -> Any:
    """The torch overload `zonda::{name}.default`."""
    return getattr(torch.ops.zonda, name).default


def _parameter(name: str, variable: str) -> OpSchema.FormalParameter:
    optional = name.endswith("?")
    option = OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single
    return OpSchema.FormalParameter(name.rstrip("?"), variable, "", param_option=option)
