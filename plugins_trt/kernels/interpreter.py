"""Run a marker's kernel on the CPU in Triton's interpreter: the numbers of the kernel's source, without a GPU.

Needs torch for its tensors, and `TRITON_INTERPRET=1` in the environment before Triton is imported, so a process
that interprets cannot compile. Triton's interpreter cuts float32 off where a GPU rounds it to bfloat16 (to the
nearest, ties to even); here it rounds too.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from ... import BuildError
from ..marker import Marker, Tensor
from . import KERNELS

_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.int64: "int64",
}


def interpret(node: Marker, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of `node` for contiguous CPU tensors, computed as the plugin would launch it.

    Raises:
        BuildError: the inputs do not fit the marker, or Triton was imported to compile.
    """
    if not triton.knobs.runtime.interpret:
        raise BuildError("set TRITON_INTERPRET=1 before the process starts: Triton was imported to compile")
    descriptions = [Tensor(tuple(t.shape), _NAMES[t.dtype]) for t in inputs]
    variant = node.variant(descriptions)
    kernel = KERNELS[variant.kernel]
    configuration = kernel.configure(variant)
    outputs = [torch.empty_like(inputs[source]) for source in node.output_sources()]
    values = (*(t.contiguous() for t in inputs), *outputs, *node.scalars(descriptions))
    arguments = dict(zip((name for name, _ in configuration.parameters), values, strict=True))
    constants = dict(configuration.constants)
    blocks = {name: value for name, value in constants.items() if value is not None}
    programs = node.programs(descriptions, blocks)
    if programs:
        with mock.patch.object(interpreter, "_convert_float", _rounding(interpreter._convert_float)):
            kernel.function[(programs,)](**arguments, **constants)
    return outputs


def _rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's conversion between float types, but to the nearest bfloat16."""

    def call(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    return call
