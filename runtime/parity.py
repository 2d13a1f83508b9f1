"""The engine's side of the parity proof: recorded logits of the eager model against an engine, teacher-forced.

Numpy only, so that a host that serves can run it. Where the recorded logits come from is `export`'s matter.
`python -m zonda.runtime.parity REQUEST` makes the comparison in a process of its own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import ParityError, ZondaError
from .engines import Engine
from .manifest import Contract, Limits, Parity

RELATIVE_TOLERANCE = 1e-5
"""Of the largest |logit|. float32 against float64 differs by 2e-6 of it on SmolLM2-135M (7.6e-5 at 41); the engine and
the eager model each may be that far off, and deeper models somewhat farther."""

DECODED = 8
"""Tokens at the end of each row that the engine takes one by one."""


@dataclass(frozen=True, slots=True)
class Golden:
    """input_ids: (B, S) right-padded; lens: (B,); logits: (B, S, V) of the eager model, float32."""

    input_ids: NDArray[np.int64]
    lens: NDArray[np.int32]
    logits: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write an `.npz` file."""
        np.savez(path, input_ids=self.input_ids, lens=self.lens, logits=self.logits)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["input_ids"], arrays["lens"], arrays["logits"])


class ProofRequest(msgspec.Struct, frozen=True):
    """What to prove: an ONNX Runtime graph by its path, how to drive it, and what it should give."""

    model: str
    contract: Contract
    limits: Limits
    golden: str


def prove(engine: Engine, golden: Golden) -> Parity:
    """Compare the engine with the eager logits: ragged prefill in chunks, then decode steps.

    Args:
        engine: with room for the golden rows.
        golden: recorded logits.

    Raises:
        ParityError: an error beyond the tolerance; the message says where and how much.
    """
    batch, longest = golden.input_ids.shape
    prefilled = np.maximum(golden.lens - DECODED, 0)
    chunk = max(1, min(engine.limits.max_chunk, -(-(longest - DECODED) // 2)))
    scale = float(np.abs(golden.logits).max())
    tolerance = RELATIVE_TOLERANCE * max(scale, 1.0)
    cache = engine.allocate(batch)
    offsets = np.zeros(batch, np.int32)
    worst, agreed, compared = 0.0, 0, 0
    while (offsets < golden.lens).any():
        wanted = np.where(offsets < prefilled, np.minimum(chunk, prefilled - offsets), 1)
        lens = np.minimum(wanted, golden.lens - offsets).astype(np.int32)
        width = int(lens.max())
        ids = np.zeros((batch, width), np.int64)
        for row, (offset, length) in enumerate(zip(offsets, lens, strict=True)):
            ids[row, :length] = golden.input_ids[row, offset : offset + length]
        positions = np.arange(width)[None].repeat(batch, 0)
        with engine.lock:
            found = engine.step(cache, 0, ids, offsets, lens, positions)
            for row, (offset, length) in enumerate(zip(offsets, lens, strict=True)):
                for k in range(length):
                    want, got = golden.logits[row, offset + k], found[row, k]
                    error = float(np.abs(want - got).max())
                    if not error <= tolerance:  # a NaN is not either
                        raise ParityError(
                            f"the engine differs from the eager model at row {row}, token {offset + k}: logits are off "
                            f"by {error:.3g}, {tolerance:.3g} is allowed (largest |logit| {scale:.3g})"
                        )
                    worst, compared = max(worst, error), compared + 1
                    agreed += int(want.argmax()) == int(got.argmax())  # if not, a tie within the tolerance
        offsets = offsets + lens
    return Parity(
        status="passed",
        reference="eager float32, the same definition",
        tokens=compared,
        max_abs_error=worst,
        max_abs_logit=scale,
        tolerance=tolerance,
        top1_agreement=agreed / compared,
        near_ties=compared - agreed,
    )


def main(request_file: str) -> int:
    """Prove what a JSON `ProofRequest` asks; the record goes to standard output, an error and status 1 elsewhere."""
    from .engines.onnxruntime import OnnxRuntimeEngine

    request = msgspec.json.decode(Path(request_file).read_bytes(), type=ProofRequest)
    try:
        engine = OnnxRuntimeEngine(Path(request.model), request.contract, request.limits)
        parity = prove(engine, Golden.read(Path(request.golden)))
    except ZondaError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(parity))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
