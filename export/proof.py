"""The parity proof: the built engine against the eager model, teacher-forced on golden prompts.

The eager model runs straight from the checkpoint, one module's weights in memory at a time, so the proof also sees
what went wrong between the checkpoint and the bundle's weight file. It cannot see a mistake in the shared definition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from .. import BuildError, ParityError
from ..models.cache import Cache
from ..models.checkpoints.base import Checkpoint
from ..runtime.engines import Engine
from ..runtime.manifest import Limits, Parity
from .describe import make_contract
from .onnx_files import LOWERED

RELATIVE_TOLERANCE = 1e-5
"""Of the largest |logit|. float32 against float64 differs by 2e-6 of it on SmolLM2-135M (7.6e-5 at 41); the engine and
the eager model each may be that far off, and deeper models somewhat farther."""

_TEXTS = (
    "The wind that the ancients called zonda comes down from the mountains hot and dry, and whoever crosses the "
    "valley on such a day learns to keep the shutters closed. In 1895 an engineer wrote: 'def speed(x): return "
    "x ** 2 / 3.6'. Nobody read it until the spring.",
    "One, two, three. Una frase en castellano, eine auf Deutsch, und dann: 12345 + 67890 = 80235.",
)
_LONGEST = 96
_DECODED = 8  # tokens at the end of each row that the engine takes one by one


@dataclass(frozen=True, slots=True)
class Golden:
    """input_ids: (B, S) right-padded; lens: (B,); logits: (B, S, V) of the eager model, float32."""

    input_ids: NDArray[np.int64]
    lens: NDArray[np.int32]
    logits: NDArray[np.float32]


def golden_prompts(tokenizer: Tokenizer, vocab_size: int, capacity: int) -> list[list[int]]:
    """Token ids of two fixed texts, of different lengths, cut to what the engine holds."""
    rows = [tokenizer.encode(text).ids[: min(_LONGEST, capacity)] for text in _TEXTS]
    return [[i % vocab_size for i in row] for row in rows]


def eager_logits(model: nn.Module, load: Callable[[str], Tensor], prompts: list[list[int]]) -> Golden:
    """Run the eager model over all prompts at once.

    Args:
        model: built on the meta device, tables real.
        load: parameter name -> tensor, read from the checkpoint; called once a use.
        prompts: token ids, ragged.
    """
    lens = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), int(lens.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    handles = [handle for name, module in model.named_modules() for handle in _stream(name, module, load)]
    try:
        with torch.no_grad():
            cache = Cache.zeros(model.kv_shapes, batch, length)  # type: ignore[arg-type]
            offsets = torch.zeros(batch, dtype=torch.int32)
            logits = model(torch.from_numpy(ids), offsets, positions, torch.from_numpy(lens), positions, cache)
    finally:
        for handle in handles:
            handle.remove()
    return Golden(ids, lens, logits.float().numpy())


def prove(engine: Engine, golden: Golden) -> Parity:
    """Compare the engine with the eager logits: chunked ragged prefill, then decode steps.

    Raises:
        ParityError: an error beyond the tolerance, or another first choice where there is no near tie.
    """
    batch, length = golden.input_ids.shape
    chunk = max(1, min(engine.limits.max_chunk, -(-(length - _DECODED) // 2)))
    cache = engine.allocate(batch)
    offsets = np.zeros(batch, np.int32)
    scale = float(np.abs(golden.logits).max())
    tolerance = RELATIVE_TOLERANCE * max(scale, 1.0)
    worst, agreed, ties, compared = 0.0, 0, 0, 0
    while (offsets < golden.lens).any():
        prefilled = offsets >= golden.lens - _DECODED
        lens = np.where(prefilled, 1, np.minimum(chunk, golden.lens - _DECODED - offsets)).astype(np.int32)
        lens = np.minimum(lens, golden.lens - offsets).astype(np.int32)
        width = int(lens.max())
        ids = np.zeros((batch, width), np.int64)
        for row in range(batch):
            ids[row, : lens[row]] = golden.input_ids[row, offsets[row] : offsets[row] + lens[row]]
        with engine.lock:
            found = engine.step(cache, 0, ids, offsets, lens, np.arange(width)[None].repeat(batch, 0)).copy()
        for row in range(batch):
            for k in range(lens[row]):
                want, got = golden.logits[row, offsets[row] + k], found[row, k]
                error = float(np.abs(want - got).max())
                if not error <= tolerance:
                    raise ParityError(
                        f"the engine differs from the eager model at row {row}, token {offsets[row] + k}: logits are "
                        f"off by {error:.3g}, {tolerance:.3g} is allowed (largest |logit| {scale:.3g}); "
                        "no bundle was written"
                    )
                worst, compared = max(worst, error), compared + 1
                same = int(want.argmax()) == int(got.argmax())
                agreed, ties = agreed + same, ties + (not same)  # within the tolerance another choice is a near tie
        offsets = offsets + lens
    return Parity(
        status="passed",
        reference="eager float32, the same definition",
        tokens=compared,
        max_abs_error=worst,
        max_abs_logit=scale,
        tolerance=tolerance,
        top1_agreement=agreed / compared,
        near_ties=ties,
    )


def unproven(status: Literal["pending", "off"], reason: str) -> Parity:
    """The record of a proof that was not made."""
    return Parity(status=status, reason=reason)


def run(
    staging: Path, module: nn.Module, checkpoint: Checkpoint, load: Callable[[str], Tensor], limits: Limits
) -> Parity:
    """Prove the ONNX Runtime engine that lies in `staging`; the eager model is gone before the engine loads.

    Raises:
        ParityError: see `prove`.
        BuildError: the checkpoint has no tokenizer to make golden prompts with.
    """
    from ..runtime.engines.onnxruntime import OnnxRuntimeEngine

    data = checkpoint.files.get("tokenizer.json")
    if data is None:
        raise BuildError("the checkpoint has no tokenizer.json, so no prompts to prove the engine with")
    prompts = golden_prompts(Tokenizer.from_buffer(data), limits.vocab_size, limits.capacity)
    golden = eager_logits(module, load, prompts)
    spec = make_contract(module.kv_shapes, limits.vocab_size)  # type: ignore[arg-type]
    rows = msgspec.structs.replace(limits, max_batch=max(limits.max_batch, len(prompts)))
    engine = OnnxRuntimeEngine(staging / LOWERED, spec, rows)
    try:
        return prove(engine, golden)
    finally:
        engine.close()


def _stream(name: str, module: nn.Module, load: Callable[[str], Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that give a module its own parameters for the time of its forward pass, and take them away again."""
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if not own:
        return []

    def fill(target: nn.Module, _: object) -> None:
        for key in own:
            target._parameters[key] = nn.Parameter(load(f"{name}.{key}").float(), requires_grad=False)

    def drop(target: nn.Module, _: object, __: object) -> None:
        target._parameters.update(own)

    return [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]
