"""Writing an engine bundle: into a temporary directory beside its place, and into its place when complete.

A build that fails or is killed leaves nothing that looks finished and does not touch the bundle that was there.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import BuildError
from ..runtime.bundle import CHECKSUMS, MANIFEST, file_sha256
from ..runtime.manifest import Manifest, encode

_MARK = ".building-"


@contextmanager
def staged(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends without an error.

    Raises:
        BuildError: `path` exists and overwrite is false or it is no bundle; its parent cannot be written; the disk
            is full.
    """
    refuse_existing(path, overwrite=overwrite)
    staging = path.parent / f".{path.name}{_MARK}{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        staging.mkdir()
        yield staging
        _sync(staging)
        _move(staging, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BuildError(f"the disk of {path.parent} is full: free some space and build again") from error
        raise BuildError(f"cannot write the bundle {path}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise `BuildError` if `path` may not be written; asked before a build starts and again before it moves."""
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise BuildError(f"{path} exists; choose another place, or pass --overwrite to replace it")
    if path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).is_file()):
        raise BuildError(f"{path} is not an engine bundle, so it will not be replaced; choose another place")


def seal(staging: Path, manifest: Manifest) -> None:
    """Write manifest.json and then SHA256SUMS over every file."""
    (staging / MANIFEST).write_bytes(encode(manifest))
    lines = [f"{file_sha256(staging / name)}  {name}\n" for name in sorted([MANIFEST, *list_files(staging)])]
    (staging / CHECKSUMS).write_text("".join(lines), "utf-8")


def list_files(staging: Path) -> dict[str, int]:
    """Path relative to the bundle -> bytes, of every file but manifest and checksums, sorted."""
    files = (file for file in staging.rglob("*") if file.is_file())
    sizes = {file.relative_to(staging).as_posix(): file.stat().st_size for file in files}
    return {name: sizes[name] for name in sorted(sizes) if name not in (MANIFEST, CHECKSUMS)}


def _sync(directory: Path) -> None:
    """Make the files durable before their directory gets its final name."""
    for file in directory.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(staging: Path, path: Path) -> None:
    refuse_existing(path, overwrite=True)
    old = path.parent / f".{path.name}.replaced-{os.getpid()}"
    if path.exists():
        path.rename(old)
    try:
        staging.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what builds of this bundle left behind that were killed."""
    for left in path.parent.glob(f".{path.name}{_MARK}*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
