"""One TensorRT target of a bundle, from the universal graph to its entry in the manifest."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from ..runtime import contract
from ..runtime.manifest import Graph, Limits, Parity, Target
from .lower.tensorrt import Dtype, lower, plugin_nodes
from .tensorrt_build import build_plan, make_profiles, write_onnx

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


def add_target(
    staging: Path,
    universal: ir.Model,
    load: Callable[[str], Tensor],
    limits: Limits,
    parity: Parity,
    *,
    name: str,
    dtype: Dtype,
    capabilities: Sequence[int],
    plugins: Sequence[str],
) -> Target:
    """Lower, build, and write plan, kernels and log into the folder `name` of the unfinished bundle.

    Args:
        staging: the unfinished bundle.
        universal: of `export_universal`; it is left as it is.
        load: initialiser name -> tensor.
        limits: of the engine.
        parity: the record that this target has not been proven, with the reason.
        name: `tensorrt-rtx` or `tensorrt`.
        dtype: of weights, activations and states.
        capabilities: compute capabilities of the GPUs.
        plugins: markers that take their plugin.

    Raises:
        BuildError: see `lower` and `build_plan`.
    """
    folder, scratch = staging / name, staging / f"{name}.onnx"
    folder.mkdir()
    scratch.mkdir()
    model = lower(universal, dtype, limits.capacity + limits.max_chunk, plugins)
    onnx = write_onnx(scratch, model, load)
    profiles = make_profiles(limits)
    report = build_plan(onnx, folder, target=name, capabilities=capabilities, profiles=profiles)
    shutil.rmtree(scratch)
    plan = f"{name}/model.plan"
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
        name=name,
        graphs=tuple(graphs),
        weights=(plan,),
        dtype=dtype,
        tool_versions={name: report.version, **versions},
        parity=parity,
        kv_dtype=dtype,
        compute_capabilities=tuple(capabilities),
        kernels=f"{name}/model.kernels" if report.plugin_layers else "",
        plugins=dict(sorted(Counter(node.op_type for node in plugin_nodes(model.graph)).items())),
        log=f"{name}/model.log",
        warnings=report.warnings,
        weight_bytes=report.weights,
    )
