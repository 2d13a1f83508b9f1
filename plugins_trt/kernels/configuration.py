"""How a variant is compiled: which function, with which parameters, block sizes and warps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cubins import Variant


@dataclass(frozen=True, slots=True)
class Configuration:
    """parameters: (name, Triton type) of the run-time parameters in order. constants: the function's constexprs.

    A constant of None is a pointer that this variant does not have.
    """

    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | None], ...]
    num_warps: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """function: decorated with `triton.jit`. configure: from a variant; raises BuildError if it is out of range."""

    function: Any
    configure: Callable[[Variant], Configuration]


def pointers(names: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Parameter list of pointers: `("x", "fp16")` becomes `("x", "*fp16")`."""
    spelled = {"int8": "i8", "int64": "i64"}
    return tuple((name, f"*{spelled.get(dtype, dtype)}") for name, dtype in zip(names, dtypes, strict=True))


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def warps_for_row(block: int) -> int:
    """Warps for one row of `block` elements in registers: the fewest that do not spill on any architecture."""
    return 4 if block <= 2048 else 8 if block <= 4096 else 16
