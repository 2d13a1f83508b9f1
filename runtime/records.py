"""What this host remembers of a bundle, outside it: which targets were proven here, and which of them is the fastest.

A record is of one bundle (by the digest of its checksums), of one host, and of the versions of what executes the
target: another bundle, host, GPU or runtime has none.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from .bundle import CHECKSUMS, Bundle
from .gpu import MODULES, find_gpu, installed_version
from .manifest import Parity, Target

Record = TypeVar("Record", bound=msgspec.Struct)


class VerificationRecord(msgspec.Struct, frozen=True):
    """That a target of a bundle has been proven on a host: parity as measured there, versions as they were."""

    host: str
    versions: dict[str, str]
    parity: Parity


class PickRecord(msgspec.Struct, frozen=True):
    """That `target` was found the fastest of those in request_s: name -> seconds of a request (see `bench`)."""

    host: str
    versions: dict[str, str]
    target: str
    request_s: dict[str, float]


def remember(bundle: Bundle, target: Target, parity: Parity) -> Path:
    """Record outside the bundle that `target` passed on this host; return the file."""
    return _write(_verified_path(bundle, target), VerificationRecord(_host(), _versions(target), parity))


def remembered(bundle: Bundle, target: Target) -> bool:
    """Whether `target` of this very bundle has passed on this host, with the runtime as it is now."""
    record = _read(_verified_path(bundle, target), VerificationRecord)
    return record is not None and _holds(record, target) and record.parity.status == "passed"


def is_proven(bundle: Bundle, target: Target) -> bool:
    """Whether the build or this host has shown that `target` computes what the eager model computes."""
    return target.parity.status == "passed" or remembered(bundle, target)


def remember_pick(bundle: Bundle, target: Target, request_s: Mapping[str, float]) -> Path:
    """Record outside the bundle that `target` is the fastest on this host; return the file.

    Args:
        bundle: opened.
        target: one of its targets.
        request_s: name of each target that it was compared with, itself included -> seconds of a request.
    """
    return _write(_picked_path(bundle), PickRecord(_host(), _versions(target), target.name, dict(request_s)))


def remembered_pick(bundle: Bundle) -> PickRecord | None:
    """Which target of this very bundle was found the fastest on this host, with the runtime as it is now."""
    record = _read(_picked_path(bundle), PickRecord)
    held = record is not None and any(t.name == record.target and _holds(record, t) for t in bundle.manifest.targets)
    return record if held else None


def _holds(record: VerificationRecord | PickRecord, target: Target) -> bool:
    return (record.host, record.versions) == (_host(), _versions(target))


def _read(path: Path, kind: type[Record]) -> Record | None:
    """A record; None if there is none, or it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(path: Path, record: msgspec.Struct) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
    temporary.replace(path)
    return path


def _verified_path(bundle: Bundle, target: Target) -> Path:
    return _state() / "verified" / f"{_digest(bundle)}-{target.graphs[0].file.replace('/', '-')}.json"


def _picked_path(bundle: Bundle) -> Path:
    return _state() / "picked" / f"{_digest(bundle)}.json"


def _state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "zonda"


def _digest(bundle: Bundle) -> str:
    return hashlib.sha256((bundle.path / CHECKSUMS).read_bytes()).hexdigest()[:32]


def _host() -> str:
    return f"{platform.node()} {platform.machine()} {platform.system()}"


def _versions(target: Target) -> dict[str, str]:
    """Versions of what executes the target; another version is another proof."""
    found = {}
    for name in ("zonda", target.kind):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    if target.kind in MODULES:
        gpu = find_gpu()
        found |= {target.kind: installed_version(target.kind) or "unknown", "gpu": str(gpu)}
    return found
