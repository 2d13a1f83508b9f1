"""Compile kernels ahead of time to cubins, on any host: no GPU, no CUDA toolkit, only Triton's wheel.

Each variant is compiled for each compute capability in a pool of processes, and kept in a cache under a hash of
all that determines it. Triton is imported in those processes only.
"""

import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec

from .. import BuildError
from .cubins import CAPABILITIES, Cubin, CubinLibrary, Usage, Variant

_OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
"""No fused multiply-add: a cubin rounds where Triton's interpreter rounds. These kernels wait for memory anyway."""


def compile_kernels(
    variants: Iterable[Variant], capabilities: Sequence[int], cache: Path | None = None, jobs: int | None = None
) -> CubinLibrary:
    """Compile every variant for every capability, or take it from the cache.

    Args:
        variants: what the nodes of the engines ask for; repeats are compiled once.
        capabilities: of the engines, e.g. (80, 86, 89, 120).
        cache: directory for compiled kernels; the platform's cache directory if None.
        jobs: processes; the number of cores if None.

    Raises:
        BuildError: a capability is unknown or cannot hold a data type, Triton is not installed, or a kernel does
            not compile; the message names the kernel and the capability.
    """
    ordered, targets = tuple(dict.fromkeys(variants)), tuple(dict.fromkeys(capabilities))
    for capability in targets:
        _check(capability, ordered)
    cache = cache or default_cache()
    compiler = _compiler()
    wanted = {(v, c): cache / f"{_key(v, c, compiler)}.cubin" for v in ordered for c in targets}
    cubins = {work: cubin for work, file in wanted.items() if (cubin := _read(file, *work)) is not None}
    missing = [work for work in wanted if work not in cubins]
    for work, cubin in zip(missing, _compile_all(missing, jobs), strict=True):
        _write(wanted[work], cubin)
        cubins[work] = cubin
    return CubinLibrary(targets, tuple(cubins[work] for work in wanted))


def default_cache() -> Path:
    """Where this platform keeps files that may be deleted at any time."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zonda" / "kernels"


def _check(capability: int, variants: Sequence[Variant]) -> None:
    if capability not in CAPABILITIES:
        raise BuildError(f"compute capability {capability} is not known; kernels are made for {list(CAPABILITIES)}")
    for variant in variants:
        if capability < 80 and "bf16" in variant.dtypes:
            raise BuildError(f"{variant}: compute capability {capability} has no bfloat16; build with fp16")


def _compiler() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("compiling kernels needs Triton: pip install 'zonda[plugins]'") from None


def _key(variant: Variant, capability: int, compiler: str) -> str:
    """Hash of all that determines a cubin: variant, capability, compiler, options, and the kernels' own source."""
    digest = hashlib.sha256(msgspec.msgpack.encode((variant, capability, compiler, sorted(_OPTIONS.items()))))
    for file in ("configuration.py", f"{variant.kernel}.py"):
        digest.update(hashlib.sha256((Path(__file__).parent / "kernels" / file).read_bytes()).digest())
    return digest.hexdigest()


def _read(file: Path, variant: Variant, capability: int) -> Cubin | None:
    """A cache entry; None if it is not there, damaged or not what its name says."""
    try:
        checksum, payload = msgspec.msgpack.decode(file.read_bytes(), type=tuple[bytes, bytes])
        cubin = msgspec.msgpack.decode(payload, type=Cubin)
    except (OSError, msgspec.MsgspecError):
        return None
    sound = checksum == hashlib.sha256(payload).digest() and (cubin.variant, cubin.capability) == (variant, capability)
    return cubin if sound else None


def _write(file: Path, cubin: Cubin) -> None:
    payload = msgspec.msgpack.encode(cubin)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(msgspec.msgpack.encode((hashlib.sha256(payload).digest(), payload)))
    os.replace(temporary.name, file)


def _compile_all(work: Sequence[tuple[Variant, int]], jobs: int | None) -> list[Cubin]:
    if not work:
        return []
    workers = min(jobs or os.cpu_count() or 1, len(work))
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="zonda-triton-") as scratch,
        ProcessPoolExecutor(workers, context, _prepare_worker, (scratch,)) as pool,
    ):
        try:
            return list(pool.map(_compile_one, work))
        except BrokenProcessPool as error:
            raise BuildError("a compiling process died, for lack of memory perhaps: try jobs=1") from error


def _prepare_worker(scratch: str) -> None:
    """Triton reads these when it is imported: compile, do not interpret, and leave nothing in the home directory."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = scratch


def _compile_one(work: tuple[Variant, int]) -> Cubin:
    """In a worker: one variant for one capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .kernels import KERNELS

    variant, capability = work
    kernel = KERNELS[variant.kernel]
    configuration = kernel.configure(variant)
    names = kernel.function.arg_names
    signature = dict.fromkeys(names, "constexpr") | dict(configuration.parameters)
    aligned = [["tt.divisibility", 16]]
    attributes = {(names.index(n),): aligned for n, kind in configuration.parameters if kind.startswith("*")}
    source = ASTSource(kernel.function, signature, dict(configuration.constants), attributes)
    options = {**_OPTIONS, "num_warps": configuration.num_warps}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton raises many kinds, some of which do not survive the way back
        raise BuildError(f"{variant} does not compile for capability {capability}: {error}") from None
    image = compiled.asm["cubin"]
    return Cubin(
        variant,
        capability,
        compiled.metadata.name,
        image,
        configuration.parameters,
        tuple((name, value) for name, value in configuration.constants if value is not None),
        configuration.num_warps,
        compiled.metadata.shared,
        read_usage(image),
    )


def read_usage(image: bytes) -> Usage:
    """Registers and spilled bytes of a cubin, from the `cuobjdump` in Triton's wheel.

    Raises:
        BuildError: cuobjdump says something unexpected.
    """
    from triton.backends import nvidia

    tool = Path(next(iter(nvidia.__path__))) / "bin" / ("cuobjdump.exe" if sys.platform == "win32" else "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(image)
        run = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    if found is None:
        raise BuildError(f"cuobjdump gave no resource usage: {(run.stderr or run.stdout).strip()[:200]}")
    return Usage(*map(int, found.groups()))
