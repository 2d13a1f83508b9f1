"""Compile the ONNX that `lower/tensorrt.py` made into a plan, in a process of its own.

TensorRT knows one logger a process, a plugin that fails while it builds can take the process with it, and its memory
must not lie on top of the exporter's. So the work is done by `tensorrt_worker.py`; here are the request, the lint
in front of it, and the answer. No GPU is needed for TensorRT-RTX.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import onnx_ir as ir
from torch import Tensor

from .. import BuildError
from ..plugins_trt import CubinLibrary, compile_kernels, variants_of
from ..plugins_trt.trt import Flavour
from ..runtime import contract
from ..runtime.manifest import Limits
from .lower.tensorrt import Lowered, plugin_nodes
from .lower.tensorrt_lint import lint
from .tensorrt_request import Profile, Report, Request
from .tensorrt_weights import stored_weights
from .weights import attach, missing_data, plan_layout, write_weights

MODULES: dict[str, Flavour] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Target -> Python module."""

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX can compile for."""


def make_profiles(limits: Limits) -> tuple[Profile, Profile]:
    """Prefill (any chunk of any rows, logits of any of its tokens) and decode (one token a row).

    Prefill is tuned for one full chunk with one logit, decode for one row.
    """
    rows, chunk = limits.max_batch, limits.max_chunk
    return (
        Profile(
            role="prefill",
            dimensions={
                contract.BATCH: (1, 1, rows),
                contract.SEQUENCE: (1, chunk, chunk),
                contract.NUM_LOGITS: (1, 1, chunk),
            },
        ),
        Profile(
            role="decode",
            dimensions={
                contract.BATCH: (1, 1, rows),
                contract.SEQUENCE: (1, 1, 1),
                contract.NUM_LOGITS: (1, 1, 1),
            },
        ),
    )


def check_capabilities(target: str, capabilities: Sequence[int], dtype: str) -> None:
    """Refuse what `target` cannot compile for.

    Raises:
        BuildError: naming the compute capability and what to do.
    """
    if not capabilities:
        raise BuildError(f"--target {target} needs --compute-capability, e.g. 80,86,89,120")
    if target == "tensorrt-rtx":
        unknown = [c for c in capabilities if c not in RTX_CAPABILITIES]
        if unknown:
            raise BuildError(
                f"TensorRT-RTX compiles for {', '.join(map(str, RTX_CAPABILITIES))}, not for {unknown[0]}; "
                "data-centre GPUs of other kinds need --target tensorrt, on the GPU host"
            )
    if dtype == "bfloat16" and min(capabilities) < 80:
        raise BuildError(f"compute capability {min(capabilities)} has no bfloat16; build with --dtype fp16")


def write_onnx(directory: Path, lowered: Lowered, load: Callable[[str], Tensor]) -> Path:
    """Write `model.onnx` and `weights.bin`, each tensor in the type that the graph says.

    Args:
        directory: an empty one.
        lowered: of `lower`; the model's initialisers are given their data.
        load: initialiser name -> tensor.

    Raises:
        BuildError: as of `stored_weights`.
    """
    model = lowered.model
    layout = plan_layout(model, {})
    write_weights(directory / "weights.bin", layout, missing_data(model), stored_weights(lowered, load))
    attach(model, layout, "weights.bin")
    path = directory / "model.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return path


def build_plan(
    onnx: Path,
    folder: Path,
    *,
    target: str,
    capabilities: Sequence[int],
    profiles: Sequence[Profile],
    name: str = "model",
    kernel_cache: Path | None = None,
) -> Report:
    """Lint, compile the kernels, build; write `{name}.plan`, `{name}.kernels` and `{name}.log` into `folder`.

    Args:
        onnx: from `write_onnx`.
        folder: where the files go.
        target: `tensorrt-rtx` or `tensorrt`.
        capabilities: compute capabilities of the plan; for `tensorrt` that of this host's GPU.
        profiles: from `make_profiles`.
        kernel_cache: of compiled kernels; the platform's cache directory if None.

    Raises:
        BuildError: the graph holds a trap, a kernel does not compile, TensorRT refuses or dies, or the plan is not
            what was asked for.
    """
    model = ir.load(onnx)
    lint(model)
    nodes = plugin_nodes(model.graph)
    variants = variants_of(nodes)
    library = compile_kernels(variants, capabilities, kernel_cache) if variants else CubinLibrary((), ())
    kernels = folder / f"{name}.kernels"
    kernels.write_bytes(library.to_bytes())
    request = Request(
        module=MODULES[target],
        onnx=str(onnx.absolute()),
        plan=str((folder / f"{name}.plan").absolute()),
        log=str((folder / f"{name}.log").absolute()),
        kernels=str(kernels.absolute()),
        capabilities=tuple(capabilities),
        profiles=tuple(profiles),
        operators=tuple(sorted({node.op_type for node in nodes})),
        plugins={str(node.name): _floats(node) for node in nodes},
        cache_updates=sum(node.op_type == "TensorScatter" for node in model.graph),
    )
    return run_worker(request)


def _floats(node: ir.Node) -> dict[str, float]:
    kinds = {name: attribute for name, attribute in node.attributes.items() if attribute.type == ir.AttributeType.FLOAT}
    return {name: attribute.as_float() for name, attribute in kinds.items()}


def run_worker(request: Request) -> Report:
    """Run `tensorrt_worker` on a request.

    Raises:
        BuildError: it said what is wrong, or it died; then with the last lines of TensorRT's log.
    """
    with tempfile.TemporaryDirectory(prefix="zonda-tensorrt-") as scratch:
        file, answer = Path(scratch) / "request.json", Path(scratch) / "report.json"
        file.write_bytes(msgspec.json.encode(request))
        command = [sys.executable, "-m", "zonda.export.tensorrt_worker", str(file), str(answer)]
        result = subprocess.run(command, capture_output=True, check=False)
        if result.returncode == 0 and answer.is_file():
            return msgspec.json.decode(answer.read_bytes(), type=Report)
    words = result.stderr.decode(errors="replace").strip()[-2000:]
    if result.returncode == 1 and words:
        raise BuildError(words)
    log = Path(request.log)
    last = "\n".join(log.read_text("utf-8").splitlines()[-5:]) if log.is_file() else ""
    raise BuildError(f"TensorRT died (exit status {result.returncode}); the end of its log:\n{last}\n{words}".rstrip())
