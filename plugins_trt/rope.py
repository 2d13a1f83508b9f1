"""Plugin of the marker `RoPE`: q and k rotated in one launch, every token by the table row at its own position.

| tensor | shape | dtype |
|---|---|---|
| q | (B, S, Hq*D), Hq*D static | fp16, bf16, fp32 |
| k | (B, S, Hkv*D); absent if `num_key_value_heads` is 0 | of q |
| cos, sin | (P, R/2), R/2 static | fp32 |
| start_offsets_kernel | (B, S) | int64 |
| q_out, k_out | as q, k | of q |

A position outside [0, P) gives NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .. import BuildError
from .cubins import Variant
from .marker import FLOATS, Field, Marker, Port, Tensor, check_shape, rows

MAX_HEAD_DIM = 512


@dataclass(frozen=True, slots=True)
class RoPE(Marker):
    """num_heads: Hq. num_key_value_heads: Hkv, 0 without k. interleaved: 0 or 1. rotary_dim: R, at most D."""

    name: ClassVar[str] = "RoPE"
    kernel: ClassVar[str] = "rope"
    fields: ClassVar[tuple[Field, ...]] = (
        Field("num_heads", int),
        Field("num_key_value_heads", int),
        Field("interleaved", int),
        Field("rotary_dim", int),
    )

    num_heads: int
    num_key_value_heads: int
    interleaved: int
    rotary_dim: int

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_key_value_heads < 0:
            raise BuildError(f"{self.name}: {self.num_heads} heads for q and {self.num_key_value_heads} for k")
        if self.interleaved not in (0, 1):
            raise BuildError(f"{self.name}: interleaved is {self.interleaved}; it must be 0 or 1")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise BuildError(f"{self.name}: rotary_dim is {self.rotary_dim}; it must be even and positive")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """See the table above."""
        k = (Port("k", like=0),) if self.num_key_value_heads else ()
        tables = (Port("cos", ("fp32",)), Port("sin", ("fp32",)))
        return (Port("q", FLOATS), *k, *tables, Port("start_offsets_kernel", ("int64",)))

    @property
    def outputs(self) -> tuple[Port, ...]:
        """See the table above."""
        return (Port("q_out", like=0), *((Port("k_out", like=1),) if self.num_key_value_heads else ()))

    def variant(self, inputs: Sequence[Tensor]) -> Variant:
        """See `Marker.variant`."""
        self.check_dtypes([tensor.dtype for tensor in inputs])
        (q, *k), (cos, sin, positions) = inputs[:-3], inputs[-3:]
        width = q.shape[-1] if q.shape else -1
        if width < 1 or width % self.num_heads:
            raise BuildError(
                f"{self.name}: the last dimension of q is {width}, not a multiple of {self.num_heads} heads"
            )
        dim, half = width // self.num_heads, self.rotary_dim // 2
        if not 2 * half <= dim <= MAX_HEAD_DIM:
            raise BuildError(
                f"{self.name}: rotary_dim {self.rotary_dim} and head dimension {dim} (limit {MAX_HEAD_DIM})"
            )
        for tensor in k:
            check_shape(self.name, "k", tensor, [*q.shape[:-1], self.num_key_value_heads * dim])
        for table, name in ((cos, "cos"), (sin, "sin")):
            check_shape(self.name, name, table, [cos.shape[0], half])
        check_shape(self.name, "start_offsets_kernel", positions, q.shape[:-1])
        sizes = {
            "heads": self.num_heads,
            "key_heads": self.num_key_value_heads,
            "dim": dim,
            "half": half,
            "interleaved": self.interleaved,
        }
        return Variant(self.kernel, self.signature(inputs), tuple(sizes.items()))

    def scalars(self, inputs: Sequence[Tensor]) -> tuple[float, ...]:
        """Rows of the tables."""
        return (inputs[-2].shape[0],)

    def programs(self, inputs: Sequence[Tensor], constants: Mapping[str, int]) -> int:  # noqa: ARG002
        """One a token."""
        return rows(inputs[0])
