"""Comparing two ways to run a model, and finding the first place where they part.

`zonda compare` is in `command.py`, Polygraphy's runners are in `polygraphy_runners.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ... import ParityError
from ...models.architecture import CausalModel
from ...runtime.engines import onnxruntime as target
from ...runtime.manifest import Contract, Limits
from ...runtime.metrics import THRESHOLDS, thresholds_of
from ..onnx_files import CACHE_FORMS, LOWERED, UNIVERSAL
from .chain import locate
from .eager import EagerSubject, reader
from .engine import EngineSubject
from .finding import Finding, Place
from .graph import GraphSubject
from .program import ProgramSubject
from .steps import make_script, tokens_for
from .subjects import Subject

__all__ = ["Finding", "Place", "explain", "locate_in_build"]


def locate_in_build(
    staging: Path,
    module: CausalModel,
    load: Callable[[str], Tensor],
    spec: Contract,
    limits: Limits,
    prompts: Sequence[Sequence[int]],
    quality: str = "exact",
) -> Finding | None:
    """Find where an unfinished bundle parts from the eager model: in the export, the lowering or the runtime.

    Args:
        staging: with `onnx/universal.onnx`, `onnx/onnxruntime.onnx` and `onnx/weights.bin`, and the forms of an int8
            cache; no manifest is needed.
        module: on the meta device, its tables real.
        load: parameter or table name -> tensor, from the checkpoint.
        spec: the contract.
        limits: of the engine.
        prompts: token ids.
        quality: class of the lowered graph; what comes before it computes in float32.

    Returns:
        The first place, None if no link of the chain exceeds its thresholds and no operation stands out.

    Raises:
        BuildError: the eager model cannot run.
        RequestError: the prompts are empty.
    """
    forms = staging / CACHE_FORMS
    rounded = forms.is_file()
    allowed = thresholds_of(quality, int8_cache=rounded)
    held = spec.with_states("int8") if rounded else spec
    read = reader(module, load)
    universal = GraphSubject(staging / UNIVERSAL, "universal")
    chain: list[Subject] = [
        EagerSubject(module, read),
        ProgramSubject(module, read),
        universal,
        GraphSubject(staging / LOWERED, "lowered"),
        EngineSubject(
            lambda: target.OnnxRuntimeEngine(staging / LOWERED, held, limits, cache_forms=forms if rounded else None),
            held,
        ),
    ]
    script = make_script(prompts, limits, tokens_for(universal.windows))
    try:
        if allowed == "float32":
            return locate(chain, script, THRESHOLDS[allowed], closely=True)
        before, after = chain[:3], chain[2:]
        found = locate(before, script, THRESHOLDS["float32"], closely=True)
        return found or locate(after, script, THRESHOLDS[allowed])
    finally:
        for subject in chain:
            subject.close()


def explain(error: ParityError, finding: Finding | None) -> ParityError:
    """The gate's error with the first place where the chain breaks, in a sentence."""
    if finding is None:
        return error
    return ParityError(f"{error}. First place: {finding.sentence()}")
