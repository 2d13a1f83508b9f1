"""Typed reads of the metadata that belong to a GGUF's architecture, and the account of what was read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import CheckpointError

_MAX_SIZE = 1 << 24  # vocabularies reach 2^18, contexts 10 million


class ArchitectureKeys(Mapping[str, Any]):
    """The metadata under `{architecture}.`, without that prefix, with typed reads; it remembers what was asked for."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], name: str) -> None:
        self.path = path
        self._name = name
        prefix = f"{name}."
        self._values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer in 1 … 2^24."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            raise self._wrong(key, f"an integer in 1 … {_MAX_SIZE:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self._wrong(key, "a positive number")
        return float(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of `allowed`, the first if the key is absent."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}")
        return str(value)

    def error(self, message: str) -> CheckpointError:
        """The error to raise for what only the caller can judge."""
        return CheckpointError(f"{self.path}: {message}")

    def refuse_unread(self) -> None:
        """Raise if a key that nobody asked for is set to anything but zero, false or nothing."""
        if unread := [key for key, value in self._values.items() if key not in self._asked and value]:
            listed = ", ".join(f"{self._name}.{key}" for key in unread[:8])
            raise self.error(f"metadata that this version does not know, and that may change the mathematics: {listed}")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"the metadata key '{self._name}.{key}' is missing")
        return value

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        found = repr(self._values[key])
        shown = found if len(found) <= 80 else f"{found[:80]}…"
        return self.error(f"the metadata key '{self._name}.{key}' must be {wanted}, found {shown}")
