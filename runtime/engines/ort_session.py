"""Opening a graph with ONNX Runtime on one provider, and refusing any other in its place."""

import platform
from pathlib import Path
from typing import Literal

from ... import BundleError, TargetUnavailableError
from .cpu_threads import granted_cores
from .ort import onnxruntime as ort

Provider = Literal["cpu", "cuda"]

_PROVIDERS: dict[Provider, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


def products_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor adds pairs of products of uint8 by int8 in 16 bits, as x86 does without VNNI.

    Such a sum saturates. ONNX Runtime then multiplies uint8 by uint8 if it is told to, which takes half as long again.
    Where the processor cannot be asked (x86 without Linux's /proc/cpuinfo), the answer is yes.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def open_session(
    model: Path, threads: int | None, provider: Provider, *, as_stored: bool = False, alternating: bool = False
) -> ort.InferenceSession:
    """A session on a provider, and on no other in its place.

    Args:
        model: the graph.
        threads: compute threads; None is one a physical core that this process may use. If that is the whole machine,
            ONNX Runtime counts the cores itself and keeps each thread on its own; else the system places the threads.
        provider: which.
        as_stored: compute with the weights as they lie in their file, without copies transposed or packed for speed:
            half the memory, for a graph that runs a few steps only.
        alternating: with another session on the same cores. Threads that wait for work keep their core busy for a
            while; these stop as soon as a step is done.

    Raises:
        BundleError: ONNX Runtime cannot read the graph.
        TargetUnavailableError: this ONNX Runtime has no such provider, or it does not work here.
    """
    wanted, *_ = providers = _PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise TargetUnavailableError(
            f"the installed onnxruntime {ort.__version__} has no {wanted}, only {ort.get_available_providers()}; "
            "pip uninstall onnxruntime, pip install 'zonda[cuda]' (the two share a name)"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = threads or granted_cores() or 0  # 0 lets ONNX Runtime choose
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if alternating:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if as_stored:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what a step frees is given back
    folding = ["ConstantFolding"] if as_stored else None
    try:
        session = ort.InferenceSession(model, options, providers=providers, disabled_optimizers=folding)
    except Exception as error:  # ONNX Runtime raises its own unnamed types
        raise BundleError(f"{model}: ONNX Runtime cannot open the graph: {error}") from error
    if session.get_providers()[0] != wanted:
        raise TargetUnavailableError(
            f"onnxruntime has fallen back from {wanted} to {session.get_providers()[0]}: it needs an NVIDIA GPU, its "
            "driver, and the CUDA and cuDNN libraries that onnxruntime-gpu was built for"
        )
    return session
