"""Plugin of `AddRmsNorm`: `total = x + residual`, `y = RmsNorm(total)`; made by lowering, no marker of the models.

| tensor | shape | dtype |
|---|---|---|
| x, residual | (..., H), H static, at most 16384; the same shape | fp16, bf16, fp32 |
| weight | (H,) | of x, or fp32 |
| y, total | (..., H) | of x |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .cubins import Variant
from .marker import FLOATS, Field, Marker, Port, Tensor, check_eps, check_shape, hidden_size, rows


@dataclass(frozen=True, slots=True)
class AddRmsNorm(Marker):
    """eps: added to the mean square."""

    name: ClassVar[str] = "AddRmsNorm"
    kernel: ClassVar[str] = "add_rms_norm"
    fields: ClassVar[tuple[Field, ...]] = (Field("eps", float),)
    inputs: ClassVar[tuple[Port, ...]] = (
        Port("x", FLOATS),
        Port("residual", like=0),
        Port("weight", ("fp32",), like=0),
    )
    outputs: ClassVar[tuple[Port, ...]] = (Port("y", like=0), Port("total", like=0))

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.name, self.eps)

    def variant(self, inputs: Sequence[Tensor]) -> Variant:
        """See `Marker.variant`."""
        self.check_dtypes([tensor.dtype for tensor in inputs])
        hidden = hidden_size(self.name, inputs[0])
        check_shape(self.name, "residual", inputs[1], inputs[0].shape)
        check_shape(self.name, "weight", inputs[2], [hidden])
        return Variant(self.kernel, self.signature(inputs), (("hidden", hidden),))

    def scalars(self, inputs: Sequence[Tensor]) -> tuple[float, ...]:  # noqa: ARG002
        """Eps."""
        return (self.eps,)

    def programs(self, inputs: Sequence[Tensor], constants: Mapping[str, int]) -> int:  # noqa: ARG002
        """One a row."""
        return rows(inputs[0])
