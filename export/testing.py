"""For tests of users: an engine held to its eager model, or to any other reference, inside pytest.

pytest loads this file as a plugin: it adds the option `--zonda-bundle` and the fixtures `zonda_bundle` and
`zonda_pipeline`. `assert_engine_matches` is an ordinary function. docs/parity.md shows both at work in CI.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime import Pipeline
    from ..runtime.bundle import Bundle
    from ..runtime.golden import Golden
    from ..runtime.manifest import Parity

Reference = str | Path | Callable[["NDArray[np.int64]"], "NDArray[np.float32]"]


def assert_engine_matches(
    bundle: str | Path,
    reference: Reference,
    prompts: Sequence[str | Sequence[int]],
    *,
    target: str | None = None,
) -> "Parity":
    """Assert that a bundle's engine computes what a reference computes, however the tokens are fed.

    The engine is teacher-forced through every schedule of the parity proof (prefill, chunks, ragged batch, idle rows,
    decode) and judged by the thresholds of its class of numerics, token by token.

    Args:
        bundle: an engine bundle.
        reference: a checkpoint (a folder, a .gguf file, a hub id), which runs as the eager torch model;
            `transformers:CHECKPOINT`, which runs as transformers has it; or a function from token ids (S,) to logits
            (S, V).
        prompts: text, or token ids; each at most the bundle's capacity.
        target: which target of the bundle; the best that runs here if None.

    Returns:
        The measured deviations.

    Raises:
        AssertionError: they differ; the message says in which schedule, where, and how much.
        ZondaError: the bundle or the reference cannot be loaded.
    """
    from .. import ParityError
    from ..runtime.bundle import open_bundle
    from ..runtime.loader import choose_target, open_engine
    from ..runtime.metrics import THRESHOLDS
    from ..runtime.parity import prove
    from ..runtime.verification import numerics_of

    opened = open_bundle(bundle)
    chosen, _ = choose_target(opened, target)
    golden = _record(opened, reference, prompts)
    engine = open_engine(opened, chosen, opened.manifest.limits)
    thresholds = chosen.parity.thresholds or THRESHOLDS[numerics_of(chosen)]
    try:
        return prove(engine, golden, thresholds, reference=getattr(reference, "__name__", str(reference)))
    except ParityError as error:
        raise AssertionError(str(error)) from None
    finally:
        engine.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--zonda-bundle`."""
    parser.getgroup("zonda").addoption("--zonda-bundle", metavar="BUNDLE", help="the engine bundle under test")


@pytest.fixture(scope="session")
def zonda_bundle(request: pytest.FixtureRequest) -> Path:
    """The bundle that `--zonda-bundle` names; tests that use it are skipped without the option."""
    path = request.config.getoption("--zonda-bundle")
    if path is None:
        pytest.skip("needs --zonda-bundle BUNDLE")
    return Path(path)


@pytest.fixture(scope="session")
def zonda_pipeline(zonda_bundle: Path) -> "Iterator[Pipeline]":
    """The bundle as a loaded pipeline."""
    from ..runtime import Pipeline

    with Pipeline.load(zonda_bundle) as pipeline:
        yield pipeline


def _record(opened: "Bundle", reference: Reference, prompts: Sequence[str | Sequence[int]]) -> "Golden":
    """The reference's logits, and its keys and values where it has them, for the prompts, shortest first."""
    import numpy as np
    from tokenizers import Tokenizer

    from ..runtime.golden import Golden

    tokenizer = Tokenizer.from_str(opened.read("tokenizer.json") or "{}")
    rows = [np.array(tokenizer.encode(p).ids if isinstance(p, str) else list(p), np.int64) for p in prompts]
    rows.sort(key=len)
    if isinstance(reference, (str, Path)) and not str(reference).startswith("transformers:"):
        return _run_eager(str(reference), opened, rows)
    run = reference if callable(reference) else _transformers(str(reference).removeprefix("transformers:"))
    logits = [np.asarray(run(row), np.float32) for row in rows]
    return Golden.of(rows, np.concatenate(logits), [[] for _ in rows])


def _run_eager(checkpoint: str, opened: "Bundle", rows: "Sequence[NDArray[np.int64]]") -> "Golden":
    import tempfile

    import torch

    from ..models import registry
    from ..models.checkpoints import open_checkpoint
    from ..models.loading import match_parameters
    from ..models.quantize_floats import quantized
    from ..models.stacking import stacked
    from .onnx_files import tensor_source
    from .proof import run_eager

    source = open_checkpoint(checkpoint)
    architecture = registry.of_config(source.config)
    source = stacked(source, architecture.stacks)
    limits = opened.manifest.limits
    with torch.device("meta"):
        module = architecture.for_rows(architecture.read_config(source.config), limits.capacity, limits.max_chunk)
    quant = opened.manifest.quantization.get("quant", "none")
    source = quantized(source, module, quant, Path(tempfile.gettempdir()))
    names = match_parameters(module, source, architecture.ignored)
    return run_eager(module, tensor_source(module, source, names), rows)


def _transformers(checkpoint: str) -> Any:
    import torch

    from .transformers_reference import load_transformers

    model = load_transformers(checkpoint)

    def run(row: "NDArray[np.int64]") -> Any:
        with torch.no_grad():
            return model(torch.from_numpy(row)[None]).logits[0].numpy()

    return run
