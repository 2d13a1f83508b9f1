"""What a marker is to a plugin: its attributes, its tensors, and the kernel that a node of it asks for.

Pure Python: `plugin.py` makes TensorRT's classes from it, `launcher.py` its launches, and the interpreter its
results, so that a marker is described once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from .. import BuildError
from .cubins import Variant

FLOATS = ("fp16", "bf16", "fp32")

MAX_HIDDEN = 16384
"""The longest row that fits in the registers of one block without spilling."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """shape: -1 is a dimension that is not known yet. dtype: fp16, bf16, fp32, int8, int64."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output. dtypes: what it may be. like: it has the dtype of this input (an output: its shape too).

    An input with both may be either.
    """

    name: str
    dtypes: tuple[str, ...] = ()
    like: int | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """An attribute of the node: one number. kind: float (ONNX FLOAT) or int (ONNX INT, int32 to TensorRT)."""

    name: str
    kind: type[float] | type[int]


class Marker(ABC):
    """One node of a marker: its attribute values, and what follows from them.

    Subclasses are frozen dataclasses with one attribute a field, checked in `__post_init__` (BuildError).
    name: the ONNX operator. kernel: the kernel's name. fields: the attributes.
    """

    name: ClassVar[str]
    kernel: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]

    @property
    @abstractmethod
    def inputs(self) -> tuple[Port, ...]:
        """In the order of the ONNX node, absent ones left out."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Port, ...]:
        """In the order of the ONNX node, absent ones left out."""

    @abstractmethod
    def variant(self, inputs: Sequence[Tensor]) -> Variant:
        """The kernel variant for these inputs; leading dimensions may be unknown.

        Raises:
            BuildError: the shapes do not fit together, or lie outside what the kernel can do.
        """

    @abstractmethod
    def scalars(self, inputs: Sequence[Tensor]) -> tuple[float, ...]:
        """The kernel's run-time scalars, in order, for inputs of known shape."""

    @abstractmethod
    def programs(self, inputs: Sequence[Tensor], constants: Mapping[str, int]) -> int:
        """Blocks to launch for inputs of known shape, given the constants that were compiled in."""

    @classmethod
    def create(cls, values: Mapping[str, float]) -> Self:
        """From the values of all fields, by name.

        Raises:
            BuildError: a value is out of range.
        """
        return cls(**values)

    def values(self) -> dict[str, float]:
        """Field name -> value: `create(values())` gives an equal node."""
        return {field.name: getattr(self, field.name) for field in self.fields}

    def accepts(self, position: int, dtypes: Sequence[str]) -> bool:
        """Whether the tensor at `position` (inputs, then outputs) may be `dtypes[position]`, given those before it."""
        port = (*self.inputs, *self.outputs)[position]
        found = dtypes[position]
        return found in port.dtypes or (port.like is not None and found == dtypes[port.like])

    def output_sources(self) -> tuple[int, ...]:
        """For each output the input whose shape and dtype it has."""
        return tuple(port.like or 0 for port in self.outputs)

    def check_dtypes(self, dtypes: Sequence[str]) -> None:
        """Raise BuildError if there are too many or too few inputs, or one is of a type that the kernel cannot take."""
        if len(dtypes) != len(self.inputs):
            expected = ", ".join(port.name for port in self.inputs)
            raise BuildError(f"{self.name} takes {expected}; the node has {len(dtypes)} inputs")
        for position, port in enumerate(self.inputs):
            if not self.accepts(position, dtypes):
                raise BuildError(f"{self.name}: {port.name} cannot be {dtypes[position]} beside {dtypes[0]}")

    def signature(self, inputs: Sequence[Tensor]) -> tuple[str, ...]:
        """Element types, inputs then outputs."""
        return tuple(tensor.dtype for tensor in (*inputs, *(inputs[source] for source in self.output_sources())))


def rows(tensor: Tensor) -> int:
    """Rows of a tensor's last dimension."""
    return math.prod(tensor.shape[:-1])


def hidden_size(marker: str, x: Tensor) -> int:
    """The static last dimension of x.

    Raises:
        BuildError: it is unknown or longer than a block's registers hold.
    """
    hidden = x.shape[-1] if x.shape else -1
    if not 1 <= hidden <= MAX_HIDDEN:
        raise BuildError(f"{marker}: the last dimension of x is {hidden}; it must be static, 1 to {MAX_HIDDEN}")
    return hidden


def check_shape(marker: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise BuildError unless `tensor` has the shape `expected`; -1 on either side fits all."""
    fits = len(tensor.shape) == len(expected) and all(
        found == want or -1 in (found, want) for found, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise BuildError(f"{marker}: {name} has shape {list(tensor.shape)}, not {list(expected)}")


def check_eps(marker: str, eps: float) -> None:
    """Raise BuildError unless eps is a number of use."""
    if not 0 <= eps < math.inf:
        raise BuildError(f"{marker}: eps is {eps}; it must be finite and not negative")
