"""`--reference transformers`: the eager model itself, held to transformers on the golden prompts.

The parity proof cannot see a mistake that the eager model and the engine share, because both come from one definition.
This can: transformers reads the checkpoint with its own reader and runs its own definition.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import BuildError, ParityError
from ..runtime.golden import Golden
from ..runtime.manifest import ReferenceReport
from ..runtime.metrics import Thresholds, Verdict, verdicts


def load_transformers(model: str, revision: str | None = None) -> Any:
    """Load a checkpoint in float32 as transformers does.

    Args:
        model: a folder, a .gguf file, or a hub id that is in the local cache.
        revision: the commit of a hub id.

    Raises:
        BuildError: transformers (or, for a GGUF, accelerate) is not installed, or cannot load it.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise BuildError("comparing with transformers needs it: pip install transformers accelerate") from error
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    source = model
    if model.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(model).parent), Path(model).name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif revision is not None:
        options["revision"] = revision
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(source, **options).eval()
    except (ImportError, OSError, ValueError) as error:
        raise BuildError(f"transformers cannot load {model}: {error}") from error


def prove_eager(model: str, revision: str | None, exact: Path, thresholds: Thresholds) -> ReferenceReport:
    """Compare what the eager model recorded with transformers; the whole float32 model is in memory meanwhile.

    Args:
        model, revision: as of `load_transformers`.
        exact: golden data with all logits.
        thresholds: of float32.

    Raises:
        ParityError: they differ; the message says where and how much.
        BuildError: as of `load_transformers`.
    """
    import transformers

    golden = Golden.read(exact)
    other = load_transformers(model, revision)
    with torch.no_grad():
        logits = [other(torch.from_numpy(prompt)[None]).logits[0].float().numpy() for prompt in golden.prompts]
    tokens = np.arange(len(golden.norms))
    found = golden.compare_logits(tokens, np.concatenate(logits))
    judged = verdicts(found, thresholds, golden.scale)
    failed = np.array([verdict is Verdict.FAIL for verdict in judged])
    wrong = np.flatnonzero(failed | ~(found.max_error <= thresholds.max_error * golden.scale))
    if len(wrong):
        first = int(wrong[0])
        row = int(np.searchsorted(golden.starts, first, side="right")) - 1
        raise ParityError(
            f"the eager model differs from transformers {transformers.__version__} at prompt {row}, token "
            f"{first - golden.starts[row]}: logits are off by {found.max_error[first] / golden.scale:.3g} of the "
            f"largest, {thresholds.max_error:.3g} is allowed; the definition in models/ or the checkpoint's reader is "
            "wrong"
        )
    return ReferenceReport(
        name=f"transformers {transformers.__version__}",
        tokens=len(found),
        cosine=float(found.cosine.min()),
        relative_error=float(found.relative_error.max()),
        max_error=float(found.max_error.max()),
        top1_agreement=float(found.agrees.mean()),
    )
