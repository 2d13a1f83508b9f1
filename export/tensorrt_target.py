"""One TensorRT target of a bundle, from the universal graph to its entry in the manifest."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from ..plugins_trt.registry import PLUGINS
from ..runtime import contract
from ..runtime.manifest import Graph, Limits, Parity, Target
from .lower.tensorrt import Dtype, lower, plugin_nodes
from .tensorrt_build import build_plan, make_profiles, write_onnx

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """One plan that a build is asked for.

    kind: `tensorrt-rtx` or `tensorrt`. dtype: of weights, activations and states. capabilities: compute capabilities
    of the GPUs. plugins: markers that take their plugin.
    """

    kind: str
    dtype: Dtype
    capabilities: tuple[int, ...]
    plugins: tuple[str, ...]

    @property
    def form(self) -> str:
        """`plugins` if all markers take theirs, `builtin` if none does, else which: `rmsnorm-rope`."""
        if set(self.plugins) == set(PLUGINS):
            return "plugins"
        return "-".join(self.plugins).lower() or "builtin"

    @property
    def name(self) -> str:
        """What the target is called, alike in every bundle: `tensorrt-rtx-plugins`."""
        return f"{self.kind}-{self.form}"


def add_target(
    staging: Path,
    universal: ir.Model,
    load: Callable[[str], Tensor],
    limits: Limits,
    parity: Parity,
    options: PlanOptions,
) -> Target:
    """Lower, build, and write plan, kernels and log into the folder of the kind in the unfinished bundle.

    Args:
        staging: the unfinished bundle.
        universal: of `export_universal`; it is left as it is.
        load: initialiser name -> tensor.
        limits: of the engine.
        parity: the record that this target has not been proven, with the reason.
        options: which plan.

    Raises:
        BuildError: see `lower` and `build_plan`.
    """
    folder, scratch = staging / options.kind, staging / f"{options.name}.onnx"
    folder.mkdir(exist_ok=True)
    scratch.mkdir()
    lowered = lower(universal, options.dtype, limits.capacity + limits.max_chunk, options.plugins)
    onnx = write_onnx(scratch, lowered, load)
    profiles = make_profiles(limits)
    report = build_plan(
        onnx,
        folder,
        target=options.kind,
        capabilities=options.capabilities,
        profiles=profiles,
        name=options.form,
    )
    shutil.rmtree(scratch)
    files = f"{options.kind}/{options.form}"
    plan = f"{files}.plan"
    if not report.plugin_layers:
        (staging / f"{files}.kernels").unlink()
    graphs = []
    for index, profile in enumerate(profiles):
        batch, sequence, logits = (
            (least, most)
            for least, _, most in (
                profile.dimensions[d] for d in (contract.BATCH, contract.SEQUENCE, contract.NUM_LOGITS)
            )
        )
        graphs.append(
            Graph(
                role=profile.role,
                file=plan,
                batch=batch,
                sequence=sequence,
                num_logits=logits,
                profile=index,
                activation_bytes=report.activations[index] if index < len(report.activations) else 0,
            )
        )
    versions = {tool: metadata.version(tool) for tool in (*_TOOLS, *(("triton",) if report.plugin_layers else ()))}
    return Target(
        name=options.name,
        kind=options.kind,
        graphs=tuple(graphs),
        weights=(plan,),
        dtype=options.dtype,
        tool_versions={options.kind: report.version, **versions},
        parity=parity,
        kv_dtype=options.dtype,
        quantization=dict(lowered.weights.classes),
        compute_capabilities=options.capabilities,
        kernels=f"{files}.kernels" if report.plugin_layers else "",
        plugins=dict(sorted(Counter(node.op_type for node in plugin_nodes(lowered.model.graph)).items())),
        log=f"{files}.log",
        warnings=report.warnings,
        weight_bytes=report.weights,
    )
