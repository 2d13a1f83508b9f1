"""What the command line calls a subject: `torch:CHECKPOINT`, `transformers:CHECKPOINT`, `universal:BUNDLE`,
`lowered:BUNDLE`, `BUNDLE` or `BUNDLE:target`.

A spec opens as one subject, or, between two of them, as the chain of everything that lies on the way.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ... import RequestError
from ...models import registry
from ...models.architecture import CausalModel
from ...models.checkpoints import open_checkpoint
from ...models.checkpoints.base import Checkpoint
from ...models.loading import match_parameters
from ...models.quantize_floats import quantized
from ...models.stacking import stacked
from ...runtime.bundle import Bundle, open_bundle
from ...runtime.loader import choose_target, open_engine
from ...runtime.manifest import Limits, Target
from ...runtime.verification import numerics_of
from ..onnx_files import LOWERED, UNIVERSAL, tensor_source
from .eager import EagerSubject, reader
from .engine import EngineSubject
from .graph import GraphSubject
from .program import ProgramSubject
from .subjects import Kind, Subject
from .transformers_model import TransformersSubject

_PREFIXES: dict[str, Kind] = {
    "torch": "eager",
    "transformers": "transformers",
    "universal": "universal",
    "lowered": "lowered",
}
_ORDER: tuple[Kind, ...] = ("transformers", "eager", "program", "universal", "lowered", "engine")


@dataclass(frozen=True, slots=True)
class Spec:
    """kind: of the subject. source: a checkpoint or a bundle. target: of a bundle; the best that runs if None."""

    text: str
    kind: Kind
    source: str
    target: str | None = None


def parse(text: str) -> Spec:
    """Read a spec.

    Raises:
        RequestError: it names nothing that could be compared.
    """
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        return Spec(text, _PREFIXES[prefix], rest)
    bundle, colon, target = text.rpartition(":")
    if Path(text).is_dir() or not colon:
        bundle, target = text, ""
    if not (Path(bundle) / "manifest.json").is_file():
        raise RequestError(
            f"{text!r} is no engine bundle; for a checkpoint write torch:{text} or transformers:{text}, for the graphs "
            "of a bundle universal:BUNDLE or lowered:BUNDLE"
        )
    return Spec(text, "engine", bundle, target or None)


class Source:
    """A checkpoint or a bundle, opened once, and the subjects that it gives."""

    def __init__(self, spec: Spec, limits: Limits | None = None, quant: str = "none") -> None:
        """Wrap.

        Args:
            spec: of any subject of it.
            limits: for a checkpoint: those of the bundle that it is compared with.
            quant: for a checkpoint of floats: how that bundle's build quantised it.
        """
        self.spec = spec
        self._quant = quant
        self._limits = limits

    @property
    def is_bundle(self) -> bool:
        """Whether it is a bundle."""
        return self.spec.kind in ("universal", "lowered", "engine")

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle; raises `BundleError`."""
        return open_bundle(self.spec.source)

    @cached_property
    def target(self) -> Target:
        """The bundle's target that is meant; raises `TargetUnavailableError`."""
        if self.spec.kind == "engine":
            return choose_target(self.bundle, self.spec.target)[0]
        return next(target for target in self.bundle.manifest.targets if target.graphs[0].file == LOWERED)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint; raises `CheckpointError`."""
        checkpoint = open_checkpoint(self.spec.source)
        return stacked(checkpoint, registry.of_config(checkpoint.config).stacks)

    @cached_property
    def _config(self) -> Any:
        return registry.of_config(self.checkpoint.config).read_config(self.checkpoint.config)

    @cached_property
    def limits(self) -> Limits:
        """What may be fed."""
        if self.is_bundle:
            return self.bundle.manifest.limits
        if self._limits is not None:
            return self._limits
        positions, vocabulary = int(self._config.max_position_embeddings), int(self._config.vocab_size)
        return Limits(capacity=positions, max_batch=8, max_chunk=min(512, positions), vocab_size=vocabulary)

    @cached_property
    def _module(self) -> tuple[CausalModel, Callable[[str], Tensor]]:
        architecture = registry.of_config(self.checkpoint.config)
        with torch.device("meta"):
            module = architecture.for_rows(self._config, self.limits.capacity, self.limits.max_chunk)
        checkpoint = quantized(self.checkpoint, module, self._quant, Path(tempfile.gettempdir()))
        names = match_parameters(module, checkpoint, architecture.ignored)
        return module, reader(module, tensor_source(module, checkpoint, names))

    @property
    def quant(self) -> str:
        """What the bundle's build was told to do with weights in floats."""
        return self.bundle.manifest.quantization.get("quant", "none")

    @property
    def dtype(self) -> str:
        """The class of numerics, as the thresholds have it."""
        return numerics_of(self.target) if self.spec.kind in ("lowered", "engine") else "float32"

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that travels with it, None if there is none."""
        if self.is_bundle:
            text = self.bundle.read("tokenizer.json")
            return Tokenizer.from_str(text) if text is not None else None
        data = self.checkpoint.files.get("tokenizer.json")
        return Tokenizer.from_buffer(data) if data is not None else None

    def subject(self, kind: Kind) -> Subject:
        """One of the subjects; what is wrong with the source is raised here."""
        name = self.spec.source
        if kind == "transformers":
            return TransformersSubject(name)
        if kind == "eager":
            return EagerSubject(*self._module, name=f"eager torch with {name}")
        if kind == "program":
            return ProgramSubject(*self._module, name=f"the traced program with {name}")
        if kind == "universal":
            return GraphSubject(self.bundle.file(UNIVERSAL), kind, f"the universal graph of {name}")
        if kind == "lowered":
            return GraphSubject(self.bundle.file(LOWERED), kind, f"the lowered graph of {name}")
        opened, target = self.bundle, self.target

        def start() -> Any:
            return open_engine(opened, target, opened.manifest.limits)

        return EngineSubject(start, opened.manifest.contract, f"{name} on {target.name}")

    def kinds(self) -> tuple[Kind, ...]:
        """What it can give, from the definition to the engine."""
        if not self.is_bundle:
            return ("transformers", "eager", "program")
        files = self.bundle.manifest.files
        there: dict[Kind, bool] = {
            "universal": UNIVERSAL in files,
            "lowered": LOWERED in files and self.target.graphs[0].file == LOWERED,
            "engine": True,
        }
        return tuple(kind for kind in there if there[kind])


def open_sources(a: Spec, b: Spec) -> tuple[Source, Source]:
    """Both sources; a checkpoint takes the limits of the bundle beside it, and one source serves two specs of it."""
    first = Source(a)
    if a.source == b.source and a.target == b.target and first.is_bundle == Source(b).is_bundle:
        wider = first if a.kind == "engine" else Source(b)
        return wider, wider
    second = Source(b)
    if first.is_bundle and not second.is_bundle:
        return first, Source(b, first.limits, first.quant)
    if second.is_bundle and not first.is_bundle:
        return Source(a, second.limits, second.quant), second
    return first, second


def chain(a: Spec, b: Spec, sources: tuple[Source, Source]) -> list[Subject]:
    """Both subjects and what lies between, each of which should equal its neighbours; the definition's side first."""
    first, second = sources
    if _ORDER.index(a.kind) > _ORDER.index(b.kind):
        a, b, first, second = b, a, second, first
    up, down = _ORDER.index(a.kind), _ORDER.index(b.kind)
    if first is second:
        return [first.subject(kind) for kind in _ORDER[up : down + 1] if kind in first.kinds()]
    if first.is_bundle and second.is_bundle:  # down to the widest graph that both have, and up again
        shared = next(
            kind for kind in ("lowered", "universal", "engine") if kind in first.kinds() and kind in second.kinds()
        )
        meet = min(_ORDER.index(shared), up)
        left = [kind for kind in reversed(_ORDER[meet : up + 1]) if kind in first.kinds()]
        right = [kind for kind in _ORDER[meet : down + 1] if kind in second.kinds()]
        return [*(first.subject(kind) for kind in left), *(second.subject(kind) for kind in right)]
    if not first.is_bundle and second.is_bundle:
        near = [kind for kind in _ORDER[up:] if kind in first.kinds()]
        far = [kind for kind in _ORDER[: down + 1] if kind in second.kinds()]
        return [*(first.subject(kind) for kind in near), *(second.subject(kind) for kind in far)]
    return [first.subject(a.kind), second.subject(b.kind)]


def tapped_kind(spec: Spec, source: Source) -> Kind | None:
    """Which subject of a source shows the values that a spec computes with, None if none can."""
    stand_ins: Mapping[Kind, Kind] = {"eager": "program", "engine": "lowered"}
    kind = stand_ins.get(spec.kind, spec.kind)
    return kind if kind in source.kinds() and kind not in ("transformers", "engine") else None
