"""An HF folder: config.json, safetensors in one file or in shards, tokenizer files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ... import CheckpointError
from .base import TEXT_FILES, CheckpointSource, TensorInfo, files_sha256
from .safetensors import SafetensorsFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_TEXT = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FolderCheckpoint:
    """See `Checkpoint`."""

    kind: Literal["normal", "gguf"] = "normal"

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None) -> None:
        """Read the folder's JSON files and the headers of its weight files.

        Raises:
            CheckpointError: a file is missing or unsound; the message says which.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json, so it is not an HF checkpoint folder")
        self.config: dict[str, Any] = read_json(path, "config.json")
        self._files = {file: SafetensorsFile(inside(path, file)) for file in _weight_files(path)}
        self._place = _place_tensors(path, self._files)
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._files[file].tensors[name] for name, file in self._place.items()
        }
        if not self.tensors:
            raise CheckpointError(f"{path}: its weight files hold no tensors")
        stored = sorted({info.stored for info in self.tensors.values()})
        self.source = CheckpointSource(name or path.resolve().name, f"safetensors {' '.join(stored)}", revision)
        self.files: Mapping[str, bytes] = _text_files(path)

    def load(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._files[self._place[name]].load(name)

    def blocks(self, name: str) -> None:  # noqa: ARG002
        """See `Checkpoint`; safetensors hold floats."""
        return

    def sha256(self) -> dict[str, str]:
        """See `Checkpoint`."""
        return files_sha256([file.path for file in self._files.values()])


def inside(path: Path, name: str) -> Path:
    """The file `name` of the folder; a link may lead out of it only to the blobs of the hub cache it lies in.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    folder = path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    target = (path / name).resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path / name} is a link to {target}, outside of its folder; put the file itself there")
    return path / name


def _read_text(path: Path, name: str) -> bytes:
    file = inside(path, name)
    if file.stat().st_size > _MAX_TEXT:
        raise CheckpointError(f"{file} is too large to be what it is called")
    return file.read_bytes()


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object that can be written again: half a surrogate pair could not.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        value = json.loads(_read_text(path, name).decode())
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name} must hold a JSON object")
    return value


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        shards = shard_names(path)
        for shard in shards:
            if not (path / shard).is_file():
                raise CheckpointError(f"{path / INDEX} lists {shard}, which is not there; download it again")
        return shards
    if (path / SINGLE).is_file():
        return [SINGLE]
    pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{path} holds its weights as a pickle ({pickles[0]}), and loading a pickle runs the code in it; "
            "use a revision with safetensors, or convert it in an environment you trust"
        )
    raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}")


def shard_names(path: Path) -> list[str]:
    """The files that a folder's index names; each a plain file name, there or not.

    Raises:
        CheckpointError: the index is no index.
    """
    weight_map = read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map must map tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{path / INDEX}: {shard!r} is not a plain file name in this folder")
    return shards


def _place_tensors(path: Path, files: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    """Tensor name -> file. With an index, files and index must say the same."""
    place: dict[str, str] = {}
    for file, content in files.items():
        for name in content.tensors:
            if name in place:
                raise CheckpointError(f"{path}: the tensor {name} is in {place[name]} and in {file}")
            place[name] = file
    if (path / INDEX).is_file():
        listed: dict[str, str] = read_json(path, INDEX)["weight_map"]
        for name in sorted(set(listed) | set(place)):
            if listed.get(name) != place.get(name):
                where = place.get(name, "no file")
                raise CheckpointError(f"{path / INDEX}: {name} should be in {listed.get(name)}, it is in {where}")
    return place


def _text_files(path: Path) -> dict[str, bytes]:
    """The text files that travel; a chat template inside tokenizer_config.json becomes a file of its own."""
    files = {name: _read_text(path, name) for name in TEXT_FILES if (path / name).is_file()}
    if "tokenizer_config.json" in files:
        config = read_json(path, "tokenizer_config.json")
        template = config.pop("chat_template", None)
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if isinstance(template, str) and "chat_template.jinja" not in files:
            files["chat_template.jinja"] = template.encode()
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files
