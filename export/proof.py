"""The parity proof at build time: golden prompts through the eager model, and the built engine held to them.

The eager model runs straight from the checkpoint, one module's weights in memory at a time, so the proof also sees
what went wrong between the checkpoint and the bundle's weight file. It cannot see a mistake in the shared definition.
The engine runs in a process of its own: its memory is not on top of the exporter's, and a crash is a failed build.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import BuildError, ParityError
from ..models.architecture import CausalModel
from ..models.cache import Cache
from ..models.checkpoints.base import Checkpoint
from ..models.loading import with_floats
from ..models.quantize import is_quantized
from ..runtime.golden import GOLDEN, Golden
from ..runtime.manifest import Limits, Parity, ReferenceReport, WeightReport
from ..runtime.metrics import thresholds_of
from ..runtime.parity import ProofRequest
from .describe import make_contract
from .lower.int8 import SHORTEST_PREFILL
from .lower.onnxruntime import Lowered
from .lower.quantized import as_written
from .onnx_files import CACHE_FORMS, LOWERED, PREFILL, UNIVERSAL, file_source
from .weight_proof import WrittenWeights

_TEXTS = (
    "The wind came down",
    "In 1895 an engineer wrote: 'def speed(x): return x ** 2 / 3.6'.",
    "One, two, three. Una frase en castellano, eine auf Deutsch, und dann: 12345 + 67890 = 80235. Наконец 東京。",
    "The wind that the ancients called zonda comes down from the mountains hot and dry, and whoever crosses the "
    "valley on such a day learns to keep the shutters closed. It takes its warmth from the heights: the air rises on "
    "the far side, leaves its rain there, and falls again by three thousand metres, a degree warmer with each hundred. "
    "Rivers swell with the snow that it melts, orchards flower too early, and people sleep badly. When it has passed, "
    "the sky is clean, the stones are white with dust, and the sound of the leaves is gone. Then someone opens the "
    "first window of the street, looks to the west, where the clouds stand like a wall that nobody built, and says "
    "what is said every year: that it has never been so strong, and that it will come back before the harvest.",
)
_LONGEST = 128
_EXACT = "golden-exact.safetensors"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the eager model computed, and the proof of the weights that it computed with.

    exact: the golden data with all logits, in a file of the unfinished bundle that must go before it is sealed: they
    are large, and the engine's process needs the memory. prompts: token ids.
    """

    exact: Path
    prompts: list[list[int]]
    weights: WeightReport


@dataclass(frozen=True, slots=True)
class Proof:
    """Records for the manifest: of the target, and of the universal graph (None if it was not made)."""

    target: Parity
    universal: Parity | None = None

    def with_reference(self, report: ReferenceReport) -> "Proof":
        """With the proof of the eager model itself."""
        target = msgspec.structs.replace(self.target, reference_proof=report)
        universal = self.universal and msgspec.structs.replace(self.universal, reference_proof=report)
        return Proof(target, universal)


def unproven(status: Literal["pending", "off"], reason: str, weights: WeightReport | None = None) -> Proof:
    """The record of a proof that was not made."""
    return Proof(Parity(status=status, reason=reason, weights=weights))


def unproven_target(verify: str) -> Parity:
    """The record of a TensorRT target: a build never runs its plan, which may be of another GPU or of none here."""
    if verify == "off":
        return unproven("off", "the build was told --verify off").target
    return unproven("pending", "a build does not run plans, which need a GPU").target


def record(
    staging: Path,
    module: CausalModel,
    checkpoint: Checkpoint,
    load: Callable[[str], Tensor],
    limits: Limits,
    lowered: Lowered | None,
) -> Recorded:
    """Run the eager model on the golden prompts, comparing every weight it reads with the bundle's.

    The digest of what it computed goes into the bundle.

    Args:
        staging: the unfinished bundle, with its graphs and weights.
        module: built on the meta device, tables real.
        checkpoint: for its tokenizer.
        load: parameter name -> tensor, read from the checkpoint.
        limits: of the engine.
        lowered: the graph for ONNX Runtime, if there is one.

    Raises:
        ParityError: a weight in the bundle is not the checkpoint's.
        BuildError: the checkpoint has no tokenizer to make golden prompts with.
    """
    prompts = golden_prompts(tokenizer_of(checkpoint), limits)
    packs, derived, corrections = (
        ({}, {}, {}) if lowered is None else (lowered.packs, lowered.derived, lowered.corrections)
    )
    written = WrittenWeights(staging, packs, derived)

    def load_checked(name: str) -> Tensor:
        tensor = load(name)
        written.check(name, as_written(name, tensor, load, corrections))
        return tensor

    golden = run_eager(module, load_checked, prompts)
    golden.digest().save(staging / GOLDEN)
    golden.save(staging / _EXACT)
    return Recorded(
        staging / _EXACT, [prompt.tolist() for prompt in prompts], written.finish(file_source(lowered, load))
    )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises BuildError if it has none."""
    data = checkpoint.files.get("tokenizer.json")
    if data is None:
        raise BuildError("the checkpoint has no tokenizer.json, so no prompts to run the model on")
    return Tokenizer.from_buffer(data)


def prove(staging: Path, recorded: Recorded, module: CausalModel, limits: Limits, quality: str) -> Proof:
    """Hold the graphs in `staging`, run by ONNX Runtime, to what was recorded, in a process of its own.

    Args:
        staging: the unfinished bundle.
        recorded: of `record`.
        module: the model.
        limits: of the engine.
        quality: class of the lowered graph; the universal one computes in float32.

    Raises:
        ParityError: one of them computes something else, or the process died.
    """
    spec = make_contract(module.kv_shapes, limits.vocab_size)
    longest = max(map(len, recorded.prompts))
    # Bodies compute over the whole buffer, so it is no longer than the prompts need; and those of quantised weights
    # dequantise the whole model in every step, so the steps are few.
    tight = msgspec.structs.replace(limits, capacity=longest, max_chunk=min(limits.max_chunk, longest))
    graphs = {"universal": ProofRequest(str(staging / UNIVERSAL), spec, tight, "float32", True, is_quantized(module))}
    if (staging / LOWERED).is_file():
        rounded = (staging / CACHE_FORMS).is_file()
        scales = str(staging / CACHE_FORMS) if rounded else ""
        allowed = thresholds_of(quality, int8_cache=rounded)
        prefill = (str(staging / PREFILL), SHORTEST_PREFILL) if (staging / PREFILL).is_file() else None
        own = spec.with_states("int8") if rounded else spec
        request = ProofRequest(str(staging / LOWERED), own, limits, allowed, prefill=prefill, cache_forms=scales)
        graphs = {"onnxruntime": request, **graphs}
    proven = {
        name: msgspec.structs.replace(_prove_elsewhere(name, request, recorded.exact), weights=recorded.weights)
        for name, request in graphs.items()
    }
    return Proof(proven.get("onnxruntime", proven["universal"]), proven["universal"])


def _prove_elsewhere(name: str, request: ProofRequest, golden: Path) -> Parity:
    """Make one proof in a process of its own."""
    _give_back_memory()
    command = [sys.executable, "-m", "zonda.runtime.parity", str(golden)]
    result = subprocess.run(command, input=msgspec.json.encode(request), capture_output=True, check=False)
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip()
        died = "" if result.returncode == 1 else f"the engine died (exit status {result.returncode}): "
        raise ParityError(f"{name}: {died}{words[-2000:]}")
    return msgspec.json.decode(result.stdout, type=Parity)


def _give_back_memory() -> None:
    """Return what was freed to the system, where the C library keeps it: the engine needs it now (100 MB measured)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def golden_prompts(tokenizer: Tokenizer, limits: Limits) -> list[NDArray[np.int64]]:
    """Token ids of four fixed texts, shortest first, cut to what the engine holds."""
    longest = min(_LONGEST, limits.capacity)
    rows = [np.array(tokenizer.encode(text).ids[:longest], np.int64) % limits.vocab_size for text in _TEXTS]
    return sorted((row for row in rows if len(row)), key=len)


def run_eager(module: CausalModel, load: Callable[[str], Tensor], prompts: Sequence[NDArray[np.int64]]) -> Golden:
    """Run the eager model over all prompts at once, one module's weights in memory at a time."""
    ids, lens = padded(prompts)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    logits, states = feed_eager(module, load, ids, lens, positions)
    return Golden.of(prompts, logits.float()[torch.from_numpy(positions < lens[:, None])].numpy(), states)


def padded(prompts: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The prompts as one step of a batch: ids (B, S), zeros where a prompt is shorter, and lengths (B,)."""
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), int(lens.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lens


def feed_eager(
    module: CausalModel,
    load: Callable[[str], Tensor],
    ids: NDArray[np.int64],
    lens: NDArray[np.int32],
    logit_positions: NDArray[np.int64],
) -> tuple[Tensor, list[list[NDArray[np.float32]]]]:
    """Run one step of the eager model over empty rows, one module's weights in memory at a time.

    Args:
        module: built on the meta device, tables real.
        load: parameter name -> tensor.
        ids: (B, S) right-padded token ids.
        lens: (B,) valid ones.
        logit_positions: (B, K).

    Returns:
        logits (B, K, V), and of each row its state tensors (Hkv, length, D).
    """
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    handles = [handle for name, part in module.named_modules() for handle in stream_parameters(name, part, load)]
    try:
        with torch.no_grad():
            cache = Cache.zeros(module.kv_shapes, batch, length)
            offsets, wanted = torch.zeros(batch, dtype=torch.int32), torch.tensor(logit_positions)
            logits = module(torch.from_numpy(ids), offsets, positions, torch.from_numpy(lens), wanted, cache)
    finally:
        for handle in handles:
            handle.remove()
    states = [[state[row, :, : lens[row]].numpy() for state in cache.tensors()] for row in range(batch)]
    return logits, states


def stream_parameters(name: str, module: CausalModel, load: Callable[[str], Tensor]) -> list[RemovableHandle]:
    """Hooks that give a module its own parameters for the time of its forward pass, and take them away again.

    Args:
        name: of the module within the model.
        module: one of its parts.
        load: parameter name -> tensor; floating ones become float32.

    Returns:
        The handles, to be removed after the pass; none for a module without parameters of its own.
    """
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if not own:
        return []

    def fill(target: nn.Module, _: object) -> None:
        for key in own:
            target._parameters[key] = nn.Parameter(with_floats(load(f"{name}.{key}")), requires_grad=False)

    def drop(target: nn.Module, _: object, __: object) -> None:
        target._parameters.update(own)

    return [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]
