"""An engine bundle on disk: opening one, and proving that its files are what the build wrote.

The bundle is not trusted: every path in it is checked to stay inside, nothing in it may be a symbolic link, and the
checksums are compared before anything is parsed further or run.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import BundleError
from . import manifest as manifest_format
from .manifest import Manifest

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
_BLOCK = 1 << 20
_MAX_TEXT = 64 << 20  # no manifest or checksum file is larger; a lie about it must not fill memory


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: where it lies, what it says of itself, and its checksums by path."""

    path: Path
    manifest: Manifest
    checksums: dict[str, str]

    def file(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            BundleError: the name is not listed or would leave the bundle.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not a file of this bundle")
        return _inside(self.path, name)

    def read(self, name: str) -> str | None:
        """The text of a listed file, None if the bundle has none of that name."""
        if name not in self.manifest.files:
            return None
        try:
            return self.file(name).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.path / name} is not UTF-8 text: {error}") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a listed JSON file, {} if the bundle has none of that name."""
        text = self.read(name)
        try:
            value = json.loads(text) if text is not None else {}
        except ValueError as error:
            raise BundleError(f"{self.path / name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BundleError(f"{self.path / name} holds no JSON object")
        return value


def open_bundle(path: str | Path, *, full: bool = False, progress: Callable[[int], None] = lambda _: None) -> Bundle:
    """Open and check a bundle.

    Every file's size is compared with the manifest, and every file but the weights is hashed.

    Args:
        path: the bundle's directory.
        full: hash the weights too (about 1.5 GB/s).
        progress: called with the bytes hashed since the last call.

    Raises:
        BundleError: it is missing, unfinished, altered, of an unknown schema, or a path in it leaves it.
    """
    root = Path(path)
    if not root.is_dir():
        raise BundleError(f"{root} is not an engine bundle: there is no such directory")
    if not (root / MANIFEST).is_file() or not (root / CHECKSUMS).is_file():
        raise BundleError(f"{root} is not an engine bundle: it has no {MANIFEST} with {CHECKSUMS}")
    checksums = _read_checksums(root)
    data = _read_bounded(_inside(root, MANIFEST))
    if checksums.get(MANIFEST) != hashlib.sha256(data).hexdigest():
        raise BundleError(f"{root / MANIFEST} is not the file that the build wrote (its sha256 differs)")
    manifest = manifest_format.decode(data)
    bundle = Bundle(root, manifest, checksums)
    if set(manifest.files) | {MANIFEST} != set(checksums):
        odd = sorted((set(manifest.files) | {MANIFEST}) ^ set(checksums))
        raise BundleError(f"{root}: {MANIFEST} and {CHECKSUMS} list different files: {', '.join(odd[:5])}")
    weights = {name for target in manifest.targets for name in target.weights}
    for name, size in manifest.files.items():
        file = _inside(root, name)
        found = file.stat().st_size
        if found != size:
            raise BundleError(f"{file} has {found:,} bytes, the build wrote {size:,}; copy the bundle again")
        if (full or name not in weights) and file_sha256(file, progress) != checksums[name]:
            raise BundleError(f"{file} is not the file that the build wrote (its sha256 differs)")
    return bundle


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The hex sha256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _read_checksums(root: Path) -> dict[str, str]:
    checksums: dict[str, str] = {}
    text = _read_bounded(_inside(root, CHECKSUMS)).decode("utf-8", "replace")
    # Split at line feeds only, and the last one must be there: no flipped bit may pass for another way to say the same.
    *lines, rest = text.split("\n")
    for number, line in enumerate(lines if not rest else [*lines, ""], 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or name in checksums:
            raise BundleError(f"{root / CHECKSUMS}, line {number}: expected '<sha256>  <path>', each path once")
        checksums[name] = digest
    return checksums


def _read_bounded(path: Path) -> bytes:
    if path.stat().st_size > _MAX_TEXT:
        raise BundleError(f"{path} is too large to be what it is called")
    return path.read_bytes()


def _inside(root: Path, name: str) -> Path:
    """The path of `name` in `root`; nothing on the way may be a link, and the way may not lead out."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise BundleError(f"{root}: the path {name!r} leaves the bundle")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path} is a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy or build it again")
    return path
