"""What a comparison found: the first place where two computations part, in words and numbers."""

from typing import Literal

import msgspec

from .measure import Statistics

Stage = Literal["definition", "export", "lowering", "runtime", "model"]
"""Between which two subjects: transformers and the eager model; eager and universal; universal and lowered; lowered
and engine; two models of the same kind."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that differs though what it is made of does not. error: of its worst token, relative to its norm."""

    tensor: str
    layer: int | None
    module: str
    marker: str
    operator: str
    error: float


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The first place where a chain of subjects, each of which should equal the one before, breaks.

    stage: which link. between: the two subjects. step, title: of the script. layer, module, marker: where, in the words
    of the model's definition; layer is None outside the layers, marker `logits` or `KV cache` where nothing between
    input and output can be seen. operator: what the later subject runs there. tensor: its name. error: of the worst
    token, relative to its norm; allowed: what it may be. row, token: the first that is beyond it; token counts from the
    start of the step, of a cache from the start of the row. reference, found: of the tensor at the tokens that count.
    explanation: what explains it, if something simple does. also: other places of the step, in order.
    """

    stage: Stage
    between: tuple[str, str]
    step: int
    title: str
    layer: int | None
    module: str
    marker: str
    operator: str
    tensor: str
    error: float
    allowed: float
    row: int
    token: int
    reference: Statistics | None = None
    found: Statistics | None = None
    explanation: str = ""
    also: tuple[Place, ...] = ()

    def sentence(self) -> str:
        """One sentence: where, how much, and why if that is known."""
        where = f"layer {self.layer}" if self.layer is not None else "outside the layers"
        module = f", {self.module}" if self.module else ""
        made = f" ({self.operator})" if self.operator and self.operator != self.marker else ""
        words = (
            f"{self.stage}: {self.between[1]} parts from {self.between[0]} at step {self.step} ({self.title}), "
            f"{where}{module}: {self.marker}{made}"
        )
        if self.tensor:
            words += f", tensor {self.tensor}, row {self.row}, token {self.token}, off by {self.error:.3g} of its norm"
        if self.tensor and not self.error <= self.allowed:
            words += f", {self.allowed:.3g} is allowed"
        return words + (f"; {self.explanation}" if self.explanation else "")
