"""Reading checkpoints: HF folders with safetensors, GGUF files, hub ids. Nothing here runs code from a checkpoint.

The formats' files are not trusted: every count, length and offset in them is checked against the file before it is
used, and whatever is wrong is one `CheckpointError` that names the file and the place.
"""

from pathlib import Path

from ... import CheckpointError
from .base import Checkpoint
from .folder import FolderCheckpoint
from .gguf import GgufCheckpoint
from .hub import download, find_cached, is_hub_id
from .quantized import unpacked

__all__ = ["Checkpoint", "fetch", "open_checkpoint"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch(source: str | Path, *, revision: str | None = None, offline: bool = False) -> str | None:
    """Bring a hub id into the local cache, showing progress; whatever else `source` is stays where it is.

    Args:
        source, revision, offline: as of `open_checkpoint`.

    Returns:
        The revision to open: the commit of a hub id, else `revision`.

    Raises:
        CheckpointError: the repository cannot be had; the message says why.
    """
    if not _is_hub(source):
        return revision
    find = find_cached if offline else download
    return find(str(source), revision=revision)[1]


def open_checkpoint(source: str | Path, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Open a checkpoint for reading; weights stay in their files until they are loaded.

    Args:
        source: a folder with config.json and safetensors, a `.gguf` file, or a hub id `organisation/name`.
        revision: of a hub id: a branch, tag or commit.
        offline: of a hub id: use the local cache only.

    Raises:
        CheckpointError: it is not there, cannot be read, or is not sound.
        ConfigError: its weights are quantised in a way that is not supported.
        UnsupportedArchitectureError: a GGUF describes a model that Zonda does not have.
    """
    try:
        return _open(source, revision, offline)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from error


def _open(source: str | Path, revision: str | None, offline: bool) -> Checkpoint:
    path = Path(source)
    if path.is_dir():
        return unpacked(FolderCheckpoint(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufCheckpoint(path)
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, and loading a pickle runs the code in it; convert to safetensors"
            )
        raise CheckpointError(f"{path}: expected a folder, a .gguf file, or a hub id")
    if _is_hub(source):
        folder, commit = (find_cached if offline else download)(str(source), revision=revision)
        return unpacked(FolderCheckpoint(folder, name=str(source), revision=commit))
    raise CheckpointError(f"{source}: there is no such file or folder, and it is no hub id (organisation/name)")


def _is_hub(source: str | Path) -> bool:
    path = Path(source)
    return is_hub_id(str(source)) and not path.exists() and path.suffix not in (".gguf", ".safetensors", *_PICKLES)
