"""A model in several GGUF files, as llama-gguf-split cuts them: `NAME-00001-of-0000N.gguf`; any of them stands for all.

The first holds the metadata of the model; every one says how many there are, which one it is, and how many tensors all
of them hold together.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import CheckpointError
from .gguf_reader import GgufFile, GgufTensor, read_gguf

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_LISTED = 4  # names of files in a message


def read_gguf_parts(path: Path) -> GgufFile:
    """Read and check the headers of a whole model.

    Args:
        path: the file, or any one of those that the model is split into.

    Raises:
        CheckpointError: of `read_gguf`; or a part is missing, is another model's, or holds a tensor that another has.
    """
    file = read_gguf(path)
    count = _integer(path, file.metadata, "split.count", 1)
    if count <= 1:
        return file
    paths = _parts(path, count)
    files = [file if part == path else read_gguf(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, (part, found) in enumerate(zip(paths, files, strict=True)):
        _check_part(part, found.metadata, files[0].metadata, number, count)
        for name, tensor in found.tensors.items():
            if name in tensors:
                raise CheckpointError(f"the tensor {name} is in {paths[tensors[name].part].name} and in {part.name}")
            tensors[name] = replace(tensor, part=number)
    announced = _integer(paths[0], files[0].metadata, "split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CheckpointError(
            f"{paths[0]}: the {count} parts hold {len(tensors)} tensors, but {announced} are announced"
        )
    return GgufFile(files[0].metadata, tensors, tuple(part for found in files for part in found.parts))


def _parts(path: Path, count: int) -> list[Path]:
    """All files, in order; they lie beside each other."""
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise CheckpointError(
            f"{path} is one of {count} parts, which are found by their names: NAME-00001-of-{count:05}.gguf and so on"
        )
    if int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is named as one of {int(name['count'])} parts, but says that it is one of {count}"
        )
    paths = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        listed = ", ".join(missing[:_LISTED])
        raise CheckpointError(
            f"{path} is one of {count} parts, of which {listed}{more} are not there; download them too"
        )
    return paths


def _check_part(path: Path, metadata: dict[str, Any], first: dict[str, Any], number: int, count: int) -> None:
    """Raise unless a part is the one that its name says, and of the model that the first one is of."""
    for key, wanted in (("split.no", number), ("split.count", count)):
        found = _integer(path, metadata, key, None)
        if found != wanted:
            raise CheckpointError(f"{path}: {key} is {found}, expected {wanted}")
    for key, value in metadata.items():
        if key != "split.no" and key != "general.alignment" and first.get(key) != value:
            raise CheckpointError(f"{path}: its {key} is not that of the first part; is it of another model?")


def _integer(path: Path, metadata: dict[str, Any], key: str, default: int | None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise CheckpointError(f"{path}: the metadata key {key!r} is {value!r}, expected a number")
    return value
