"""The GGUF container (versions 2 and 3, little-endian): metadata and tensor places, every number checked.

Written here and not taken from the `gguf` package because that reader trusts the counts and lengths in the file.
What the numbers of types mean comes from the package. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from ... import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# What no real file comes near; a lie in a sparse file of many gigabytes must not cost more than these.
_MAX_HEADER = 128 << 20
_MAX_TEXT = 16 << 20
_MAX_ELEMENTS = 1 << 22  # of all metadata arrays together; Gemma's vocabulary and merges are 0.8 million
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape: rows first, as torch has it. offset, nbytes: the place of its data in the file. part: which file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class GgufPart:
    """A file, and all of it mapped."""

    path: Path
    mapping: mmap.mmap


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What was checked: metadata by key (arrays as lists), tensors by name, the file or the files it is split into."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    parts: tuple[GgufPart, ...]

    def raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The tensor's bytes, a view of the mapping.

        Raises:
            CheckpointError: its file has changed its size since.
        """
        part = self.parts[tensor.part]
        if part.path.stat().st_size != len(part.mapping):
            raise CheckpointError(f"{part.path} changed its size since it was opened")
        return np.frombuffer(part.mapping, np.uint8, tensor.nbytes, tensor.offset)

    def release(self) -> None:
        """Let go of the pages read so far; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for part in self.parts:
                part.mapping.madvise(mmap.MADV_DONTNEED)


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header; tensor data stays in the file.

    Raises:
        CheckpointError: not a GGUF file, truncated, or one of its numbers lies.
    """
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path} is too short to be a GGUF file")
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, mapping)
    if bytes(cursor.take(4, "the magic number")) != b"GGUF":
        raise cursor.error("it does not begin with 'GGUF', so it is not a GGUF file")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version} is not supported; 2 and 3 are (little-endian)")
    tensor_count = cursor.count(24, "tensors")
    metadata_count = cursor.count(12, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text(_MAX_NAME, "a metadata key")
        if not key or key in metadata:
            raise cursor.error(f"the metadata key {key!r} appears twice" if key else "a metadata key is empty")
        metadata[key] = cursor.value(key)
    places = [_read_place(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(metadata, _place_tensors(cursor, places, start, alignment), (GgufPart(path, mapping),))


class _Cursor:
    """Reads from the front of the file and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.size = len(data)
        self.position = 0
        self._elements = 0
        self._data = memoryview(data)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, length: int, what: str) -> memoryview:
        if length > self.size - self.position:
            raise self.error(
                f"it ends inside {what}: {length:,} bytes are announced at {self.position:,} of {self.size:,}"
            )
        if self.position + length > _MAX_HEADER:
            raise self.error(f"its header passes {_MAX_HEADER:,} bytes inside {what}, more than any model needs")
        self.position += length
        return self._data[self.position - length : self.position]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A count of things of at least `smallest` bytes each, which must fit what is left of the file."""
        count: int = self.number("Q", f"the number of {what}")
        if count * smallest > self.size - self.position:
            raise self.error(f"it announces {count:,} {what}, more than its {self.size:,} bytes can hold")
        return count

    def elements(self, smallest: int, key: str) -> int:
        """The length of an array."""
        count = self.count(smallest, f"elements of {key}")
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise self.error(f"its arrays up to {key} have {self._elements:,} elements, more than any model needs")
        return count

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > longest:
            raise self.error(f"{what} is announced with {length:,} bytes, at most {longest:,} are allowed")
        try:
            return bytes(self.take(length, what)).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error}") from error

    def value(self, key: str) -> Any:
        return self._typed(self._type(key), key)

    def _type(self, key: str) -> GGUFValueType:
        number = self.number("I", f"the type of {key}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.error(f"the metadata key {key!r} has the unknown type {number}") from None

    def _typed(self, kind: GGUFValueType, key: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text(_MAX_TEXT, f"the text of {key}")
        if kind == GGUFValueType.FLOAT32:
            # the shortest decimal that means this float32 is what the model's authors wrote: 1e-05
            return float(str(np.float32(self.number("f", key))))
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind], key)
        inner = self._type(key)
        if inner == GGUFValueType.ARRAY:
            raise self.error(f"the metadata key {key!r} is an array of arrays, which no known key is")
        if inner == GGUFValueType.STRING:
            return [self.text(_MAX_TEXT, f"an element of {key}") for _ in range(self.elements(8, key))]
        size = struct.calcsize("<" + _SCALARS[inner])
        count = self.elements(size, key)
        return np.frombuffer(self.take(count * size, key), "<" + _SCALARS[inner]).tolist()


def _read_place(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text(_MAX_NAME, "a tensor name")
    dimensions = cursor.number("I", f"the shape of {name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"{name} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))
    number = cursor.number("I", f"the type of {name}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.error(f"{name} has the unknown tensor type {number}") from None
    return name, kind, tuple(reversed(shape)), cursor.number("Q", f"the offset of {name}")


def _place_tensors(
    cursor: _Cursor,
    places: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]],
    start: int,
    alignment: int,
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in places:
        if name in tensors:
            raise cursor.error(f"the tensor {name} appears twice")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise cursor.error(f"{name} of shape {list(shape)} cannot be stored as {kind.name}, in blocks of {block}")
        if offset % alignment:
            raise cursor.error(f"the data of {name} are not aligned to {alignment} bytes")
        tensors[name] = GgufTensor(name, kind, shape, start + offset, math.prod(shape) // block * block_bytes)
    needed = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if needed > cursor.size:
        raise cursor.error(
            f"the file is {cursor.size:,} bytes, its tensors need {needed:,}: truncated or corrupt; download it again"
        )
    position, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < position:
            raise cursor.error(f"the tensors {before} and {tensor.name} overlap")
        position, before = tensor.offset + tensor.nbytes, tensor.name
    return tensors
