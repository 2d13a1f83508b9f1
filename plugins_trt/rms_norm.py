"""Plugin of the marker `RmsNorm`: `y = x / sqrt(mean(x²) + eps) * weight`.

| tensor | shape | dtype |
|---|---|---|
| x | (..., H), H static, at most 16384 | fp16, bf16, fp32 |
| weight | (H,) | of x, or fp32 |
| y | (..., H) | of x |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .cubins import Variant
from .marker import FLOATS, Field, Marker, Port, Tensor, check_eps, check_shape, hidden_size, rows


@dataclass(frozen=True, slots=True)
class RmsNorm(Marker):
    """eps: added to the mean square."""

    name: ClassVar[str] = "RmsNorm"
    kernel: ClassVar[str] = "rms_norm"
    fields: ClassVar[tuple[Field, ...]] = (Field("eps", float),)
    inputs: ClassVar[tuple[Port, ...]] = (Port("x", FLOATS), Port("weight", ("fp32",), like=0))
    outputs: ClassVar[tuple[Port, ...]] = (Port("y", like=0),)

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.name, self.eps)

    def variant(self, inputs: Sequence[Tensor]) -> Variant:
        """See `Marker.variant`."""
        self.check_dtypes([tensor.dtype for tensor in inputs])
        hidden = hidden_size(self.name, inputs[0])
        check_shape(self.name, "weight", inputs[1], [hidden])
        return Variant(self.kernel, self.signature(inputs), (("hidden", hidden),))

    def scalars(self, inputs: Sequence[Tensor]) -> tuple[float, ...]:
        """Eps, rows."""
        return self.eps, rows(inputs[0])

    def programs(self, inputs: Sequence[Tensor], constants: Mapping[str, int]) -> int:
        """Each takes ROWS rows."""
        return -(-rows(inputs[0]) // constants["ROWS"])
