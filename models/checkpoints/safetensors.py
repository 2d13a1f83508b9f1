"""One safetensors file: its header checked against the file, its tensors mapped by the `safetensors` library.

The format: 8 bytes of header length, a JSON header of names, dtypes, shapes and byte ranges, the data.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import CheckpointError
from .base import TensorInfo

_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_INTEGER = (1 << 63) - 1
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_KNOWN = {**_DTYPES, **_INTEGERS, "BOOL": torch.bool}


class SafetensorsFile:
    """tensors: name -> what it is; `load` maps one."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: it is truncated, or its header lies.
        """
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise self._error(
                    f"it has {size:,} bytes, its header should have {length:,}; it is truncated or corrupt"
                )
            header = self._parse(file.read(length))
        ranges = []
        for name, entry in header.items():
            if name != "__metadata__":
                ranges.append(self._check(name, entry, size - 8 - length))
        self._check_ranges(ranges, size - 8 - length)

    def load(self, name: str) -> Tensor:
        """One tensor, mapped; the mapping lives as long as the tensor, so what was read does not stay in memory."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._error(f"{name} cannot be read: {error}") from error
        return tensor

    def _parse(self, data: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len({key for key, _ in pairs}) != len(pairs):
                raise self._error("its header names a key twice")
            return dict(pairs)

        try:
            header = json.loads(data.decode(), object_pairs_hook=unique)
            if not isinstance(header, dict):
                raise self._error("its header is not a JSON object")
            "".join(header).encode()  # half a surrogate pair cannot be written, not even in a message
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is not JSON: {error}") from error
        return header

    def _check(self, name: str, entry: Any, size: int) -> tuple[int, int, str]:
        try:
            stored, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._error(f"{name} lacks dtype, shape or data_offsets") from None
        numbers = [start, end, *shape] if isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS else [None]
        if not all(type(n) is int and 0 <= n <= _MAX_INTEGER for n in numbers):
            raise self._error(f"{name}: shape and data_offsets must be integers, not negative and not too large")
        if not isinstance(stored, str) or stored not in _KNOWN:
            raise self._error(f"{name} has dtype {stored!r}; known: {', '.join(_KNOWN)}")
        wanted = math.prod(shape) * _KNOWN[stored].itemsize
        if end - start != wanted or end > size:
            raise self._error(
                f"{name} of shape {shape} needs {wanted:,} bytes; its place is {start:,} to {end:,} of {size:,}"
            )
        self.tensors[name] = TensorInfo(tuple(shape), _KNOWN[stored], stored)
        return start, end, name

    def _check_ranges(self, ranges: list[tuple[int, int, str]], size: int) -> None:
        position = 0
        for start, end, name in sorted(ranges):
            if start != position:
                raise self._error(f"the data of {name} begins at {start:,}, it should at {position:,}")
            position = end
        if position != size:
            raise self._error(f"its tensors have {position:,} bytes, the file {size:,}; it is truncated or corrupt")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")
