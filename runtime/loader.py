"""Loaders: from a bundle on disk to a Pipeline, one a kind of model.

A loader chooses the target that this host can run best, opens its engine, and gives it the tokenizer, template and
defaults that travel in the bundle.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import msgspec
from tokenizers import Tokenizer

from .. import BundleError, RequestError, TargetUnavailableError, ZondaError
from .bundle import Bundle, open_bundle
from .chat_template import ChatTemplate
from .engines import Engine
from .gpu import MODULES, plan_obstacle
from .manifest import Limits, Parity, Target
from .pipeline import Pipeline
from .records import PickRecord, is_proven, remembered_pick
from .sampling import SamplingParams
from .verification import prove_target

PREFERENCE = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""Kinds of targets from best to most portable."""

CUDA_PROVIDER = "onnxruntime-cuda"
"""Not a target of a bundle: the universal graph by ONNX Runtime's CUDA provider, for whoever asks for it."""

_UNIVERSAL = "onnx/universal.onnx"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """See `Pipeline.load`."""

    target: str | None = None
    threads: int | None = None
    capacity: int | None = None
    max_batch: int | None = None


class Loader(Protocol):
    """Loads bundles of one kind."""

    def load(self, bundle: Bundle, options: LoadOptions) -> Pipeline:
        """Open an engine for `bundle`; errors as of `Pipeline.load`."""


class NormalLoader:
    """One decoder with one KV cache: a model as its authors published it, from a float or a quantised checkpoint."""

    def load(self, bundle: Bundle, options: LoadOptions) -> Pipeline:
        """See `Loader`."""
        target, passed_over = choose_target(bundle, options.target)
        limits = _limits(bundle, options)
        engine = open_engine(bundle, target, limits, options.threads)
        manifest = bundle.manifest
        return Pipeline(
            engine,
            _tokenizer(bundle),
            eos_token_ids=manifest.eos_token_ids,
            template=_template(bundle),
            default_params=SamplingParams.from_generation_config(bundle.read_json("generation_config.json")),
            bundle=bundle,
            target=target.name,
            passed_over=passed_over,
        )


LOADERS: dict[str, Loader] = {"normal": NormalLoader(), "gguf": NormalLoader()}
"""Kind of a bundle -> its loader. LoRA and X-LoRA bundles will each have their own."""


def load_pipeline(
    path: str | Path,
    *,
    target: str | None = None,
    verify: Literal["quick", "full", True] = "quick",
    threads: int | None = None,
    capacity: int | None = None,
    max_batch: int | None = None,
) -> Pipeline:
    """See `Pipeline.load`."""
    if verify not in ("quick", "full", True):
        raise RequestError(f"verify must be 'quick', 'full' or True, found {verify!r}")
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, found {threads}")
    bundle = open_bundle(path, full=verify == "full")
    loader = LOADERS.get(bundle.manifest.kind)
    if loader is None:
        known = ", ".join(LOADERS)
        raise BundleError(f"{path}: a bundle of kind {bundle.manifest.kind!r} has no loader here; known: {known}")
    pipeline = loader.load(bundle, LoadOptions(target, threads, capacity, max_batch))
    if verify is True:
        running = next(one for one in targets_of(bundle, target) if one.name == pipeline.target)
        try:
            prove_target(bundle, running, pipeline.engine, quick=True)
        except ZondaError:
            pipeline.close()
            raise
    return pipeline


def choose_target(bundle: Bundle, forced: str | None) -> tuple[Target, dict[str, str]]:
    """The target to run, and why better ones were passed over.

    What `zonda bench` found the fastest here comes before those that it was compared with. An unproven target is
    passed over unless it is forced: a proven one beats an unproven faster one.

    Args:
        bundle: opened.
        forced: name of a target, or the kind of several; None leaves the choice.

    Raises:
        TargetUnavailableError: none is left.
    """
    order = targets_of(bundle, forced)
    if forced is not None:
        order.sort(key=lambda target: not is_proven(bundle, target))
    reasons: dict[str, str] = {}
    pick = remembered_pick(bundle)
    for target in order if pick is None else with_pick(order, pick):
        reason = obstacle(bundle, target, forced=forced is not None)
        if reason is None:
            why = ""
            if pick is not None and target.name == pick.target:
                slower = [t.name for t in order[: order.index(target)] if t.name in pick.request_s]
                reasons |= dict.fromkeys(slower, f"`zonda bench` found {target.name} faster here")
                why = ", the fastest here by `zonda bench`"
            passed_over = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
            _log.info("%s: running %s (%s%s)%s", bundle.path, target.name, target.dtype, why, passed_over)
            return target, reasons
        reasons[target.name] = reason
    if forced is not None and not order:
        reasons[forced] = "the bundle was not built for it; build again with --target"
    lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    names = ", ".join(target.name for target in bundle.manifest.targets)
    raise TargetUnavailableError(f"{bundle.path}: no target can run here; the bundle has {names or 'none'}{lines}")


def targets_of(bundle: Bundle, wanted: str | None) -> list[Target]:
    """The targets with the name or of the kind `wanted`, all if it is None; from best to most portable."""
    targets = _universal(bundle) if wanted == CUDA_PROVIDER else bundle.manifest.targets
    ranks = {kind: rank for rank, kind in enumerate(PREFERENCE)}
    named = [target for target in targets if wanted in (None, target.name, target.kind)]
    return sorted(named, key=lambda target: ranks.get(target.kind, len(ranks)))


def with_pick(order: Sequence[Target], pick: PickRecord) -> list[Target]:
    """`order` with the picked target in front of the first that it was compared with."""
    picked = next((target for target in order if target.name == pick.target), None)
    compared = [target for target in order if target.name in pick.request_s]
    if picked is None or not compared:
        return list(order)
    before = order.index(compared[0])
    return [*order[:before], picked, *(target for target in order[before:] if target is not picked)]


def obstacle(bundle: Bundle, target: Target, *, forced: bool) -> str | None:
    """Why a target of a bundle cannot be loaded on this host, None if it can; forced: unproven ones may be."""
    if target.kind in MODULES:
        reason = plan_obstacle(target)
    elif target.kind not in ("onnxruntime", CUDA_PROVIDER):
        reason = "this version of zonda does not know it"
    elif importlib.util.find_spec("onnxruntime") is None:
        reason = "onnxruntime is not installed; pip install 'zonda[cpu]'"
    else:
        reason = None
    if reason is None and target.parity.status == "pending" and not forced and not is_proven(bundle, target):
        reason = (
            f"it has not been proven ({target.parity.reason}); `zonda verify` proves it here, target={target.name!r} "
            "forces it"
        )
    return reason


def _limits(bundle: Bundle, options: LoadOptions) -> Limits:
    limits = bundle.manifest.limits
    for name in ("capacity", "max_batch"):
        wanted, built = getattr(options, name), getattr(limits, name)
        if wanted is not None and not 1 <= wanted <= built:
            raise RequestError(f"{name} must lie in [1, {built}], what the bundle was built for; found {wanted}")
    return msgspec.structs.replace(
        limits,
        capacity=options.capacity or limits.capacity,
        max_batch=options.max_batch or limits.max_batch,
    )


def open_engine(bundle: Bundle, target: Target, limits: Limits, threads: int | None = None) -> Engine:
    """Open the engine of a target that has no obstacle.

    Raises:
        EngineError: TensorRT or the GPU refuses; DeviceMemoryError if memory is what it lacks.
        BundleError: a file of the target is not what it should be.
    """
    spec = bundle.manifest.contract
    if target.kind in MODULES:
        files = dict.fromkeys(graph.file for graph in target.graphs)
        if len(files) != 1:
            raise BundleError(
                f"{bundle.path}: target {target.name} has {len(files)} graph files; this version runs one"
            )
        (file,) = files
        from .engines.tensorrt import TensorRtEngine

        kernels = bundle.file(target.kernels).read_bytes() if target.kernels else None
        trt = load_tensorrt(MODULES[target.kind])
        return TensorRtEngine(trt, bundle.file(file), spec, limits, cubins=kernels, plugins=tuple(target.plugins))
    from .engines.onnxruntime import OnnxRuntimeEngine

    provider: Literal["cpu", "cuda"] = "cuda" if target.kind == CUDA_PROVIDER else "cpu"
    model, prefill = _onnx_graphs(bundle, target)
    return OnnxRuntimeEngine(
        model,
        spec.with_states(target.kv_dtype) if target.kv_dtype else spec,
        limits,
        threads=threads,
        provider=provider,
        prefill=prefill,
        cache_forms=bundle.file(target.cache_forms) if target.cache_forms else None,
    )


def _onnx_graphs(bundle: Bundle, target: Target) -> tuple[Path, tuple[Path, int] | None]:
    """The graph for every step, or that for decode; and then that for prefill, with the tokens a row it begins at.

    Raises:
        BundleError: the target has other graphs than these, or they leave out some lengths.
    """
    graphs = {graph.role: graph for graph in target.graphs}
    if len(target.graphs) == len(graphs):
        if graphs.keys() == {"any"}:
            return bundle.file(graphs["any"].file), None
        if graphs.keys() == {"decode", "prefill"}:
            decode, prefill = graphs["decode"], graphs["prefill"]
            if decode.sequence[0] == 1 and decode.sequence[1] + 1 == prefill.sequence[0]:
                return bundle.file(decode.file), (bundle.file(prefill.file), prefill.sequence[0])
    found = ", ".join(f"{g.role} ({g.sequence[0]} to {g.sequence[1]} tokens)" for g in target.graphs)
    raise BundleError(
        f"{bundle.path}: target {target.name} needs one graph for any step, or one for decode and one for prefill that "
        f"take every length between them; it has {found or 'none'}"
    )


def _universal(bundle: Bundle) -> tuple[Target, ...]:
    """The bundle's ONNX Runtime target, with the universal graph in place of the one lowered for the CPU."""
    return tuple(
        msgspec.structs.replace(
            target,
            name=CUDA_PROVIDER,
            kind=CUDA_PROVIDER,
            kv_dtype="",
            cache_forms="",
            quality="exact",
            graphs=(msgspec.structs.replace(target.graphs[0], role="any", file=_UNIVERSAL),),
            parity=Parity(status="pending", reason="it has not been run by the CUDA provider"),
        )
        for target in bundle.manifest.targets
        if target.kind == "onnxruntime" and _UNIVERSAL in bundle.manifest.files
    )


def load_tensorrt(module: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`, ready for plugins. Raises ZondaError if it cannot be loaded."""
    from ..plugins_trt.trt import load

    return load(module)  # type: ignore[arg-type]


def _tokenizer(bundle: Bundle) -> Tokenizer:
    text = bundle.read("tokenizer.json")
    if text is None:
        raise BundleError(f"{bundle.path} has no tokenizer.json")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{bundle.path / 'tokenizer.json'} is not a tokenizer: {error}") from error


def _template(bundle: Bundle) -> ChatTemplate | None:
    source = bundle.read("chat_template.jinja")
    if source is None:
        return None
    config: Mapping[str, Any] = bundle.read_json("tokenizer_config.json")
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return ChatTemplate(source, **{name: text for name, text in special.items() if text is not None})


def _token_text(value: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: text, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
