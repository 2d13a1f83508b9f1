"""Plugin of the marker `QRmsNorm`: `RmsNorm` with the gain `codes * scales`, one scale for each group of codes.

| tensor | shape | dtype |
|---|---|---|
| x | (..., H), H static, at most 16384 | fp16, bf16, fp32 |
| codes | (G, H/G), or the same bytes as (H,) | int8 |
| scales | (G,) | fp16, bf16, fp32 |
| y | (..., H) | of x |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .. import BuildError
from .cubins import Variant
from .marker import FLOATS, Field, Marker, Port, Tensor, check_eps, check_shape, hidden_size, rows


@dataclass(frozen=True, slots=True)
class QRmsNorm(Marker):
    """eps: added to the mean square."""

    name: ClassVar[str] = "QRmsNorm"
    kernel: ClassVar[str] = "q_rms_norm"
    fields: ClassVar[tuple[Field, ...]] = (Field("eps", float),)
    inputs: ClassVar[tuple[Port, ...]] = (Port("x", FLOATS), Port("codes", ("int8",)), Port("scales", FLOATS))
    outputs: ClassVar[tuple[Port, ...]] = (Port("y", like=0),)

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.name, self.eps)

    def variant(self, inputs: Sequence[Tensor]) -> Variant:
        """See `Marker.variant`."""
        self.check_dtypes([tensor.dtype for tensor in inputs])
        hidden = hidden_size(self.name, inputs[0])
        codes, scales = inputs[1:]
        groups = scales.shape[0] if len(scales.shape) == 1 else -1
        if groups < 1 or hidden % groups:
            raise BuildError(f"{self.name}: scales of shape {list(scales.shape)} do not divide a gain of {hidden}")
        check_shape(self.name, "codes", codes, [hidden] if len(codes.shape) == 1 else [groups, hidden // groups])
        return Variant(self.kernel, self.signature(inputs), (("hidden", hidden), ("group", hidden // groups)))

    def scalars(self, inputs: Sequence[Tensor]) -> tuple[float, ...]:  # noqa: ARG002
        """Eps."""
        return (self.eps,)

    def programs(self, inputs: Sequence[Tensor], constants: Mapping[str, int]) -> int:  # noqa: ARG002
        """One a row."""
        return rows(inputs[0])
