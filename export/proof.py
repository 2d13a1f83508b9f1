"""The parity proof at build time: golden prompts through the eager model, and the built engine held to them.

The eager model runs straight from the checkpoint, one module's weights in memory at a time, so the proof also sees
what went wrong between the checkpoint and the bundle's weight file. It cannot see a mistake in the shared definition.
The engine runs in a process of its own: its memory is not on top of the exporter's, and a crash is a failed build.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import BuildError, ParityError
from ..models.architecture import CausalModel
from ..models.cache import Cache
from ..models.checkpoints.base import Checkpoint
from ..runtime.manifest import Limits, Parity
from ..runtime.parity import Golden, ProofRequest
from .describe import make_contract
from .onnx_files import LOWERED

_TEXTS = (
    "The wind that the ancients called zonda comes down from the mountains hot and dry, and whoever crosses the "
    "valley on such a day learns to keep the shutters closed. In 1895 an engineer wrote: 'def speed(x): return "
    "x ** 2 / 3.6'. Nobody read it until the spring.",
    "One, two, three. Una frase en castellano, eine auf Deutsch, und dann: 12345 + 67890 = 80235.",
)
_LONGEST = 96


def unproven(status: Literal["pending", "off"], reason: str) -> Parity:
    """The record of a proof that was not made."""
    return Parity(status=status, reason=reason)


def run(
    staging: Path, module: CausalModel, checkpoint: Checkpoint, load: Callable[[str], Tensor], limits: Limits
) -> Parity:
    """Prove the ONNX Runtime engine that lies in `staging`.

    Args:
        staging: the unfinished bundle.
        module: built on the meta device, tables real.
        checkpoint: for its tokenizer.
        load: parameter name -> tensor, read from the checkpoint.
        limits: of the engine.

    Raises:
        ParityError: the engine computes something else, or died.
        BuildError: the checkpoint has no tokenizer to make golden prompts with.
    """
    data = checkpoint.files.get("tokenizer.json")
    if data is None:
        raise BuildError("the checkpoint has no tokenizer.json, so no prompts to prove the engine with")
    prompts = golden_prompts(Tokenizer.from_buffer(data), limits)
    golden = eager_logits(module, load, prompts)
    spec = make_contract(module.kv_shapes, limits.vocab_size)
    rows = msgspec.structs.replace(limits, max_batch=len(prompts))
    with tempfile.TemporaryDirectory(prefix="zonda-proof-") as scratch:
        folder = Path(scratch)
        golden.save(folder / "golden.npz")
        request = ProofRequest(str(staging / LOWERED), spec, rows, str(folder / "golden.npz"))
        (folder / "request.json").write_bytes(msgspec.json.encode(request))
        del golden
        command = [sys.executable, "-m", "zonda.runtime.parity", str(folder / "request.json")]
        result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip()
        died = "" if result.returncode == 1 else f"the engine died (exit status {result.returncode}): "
        raise ParityError(f"{died}{words[-2000:]}; no bundle was written")
    return msgspec.json.decode(result.stdout, type=Parity)


def golden_prompts(tokenizer: Tokenizer, limits: Limits) -> list[list[int]]:
    """Token ids of two fixed texts, of different lengths, cut to what the engine holds."""
    rows = [tokenizer.encode(text).ids[: min(_LONGEST, limits.capacity)] for text in _TEXTS]
    return [[token % limits.vocab_size for token in row] for row in rows]


def eager_logits(module: CausalModel, load: Callable[[str], Tensor], prompts: list[list[int]]) -> Golden:
    """Run the eager model over all prompts at once; peak memory is its largest module."""
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), int(lens.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    handles = [handle for name, part in module.named_modules() for handle in _stream(name, part, load)]
    try:
        with torch.no_grad():
            cache = Cache.zeros(module.kv_shapes, batch, length)
            offsets = torch.zeros(batch, dtype=torch.int32)
            logits = module(torch.from_numpy(ids), offsets, positions, torch.from_numpy(lens), positions, cache)
    finally:
        for handle in handles:
            handle.remove()
    return Golden(ids, lens, logits.float().numpy())


def _stream(name: str, module: CausalModel, load: Callable[[str], Tensor]) -> list[RemovableHandle]:
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
