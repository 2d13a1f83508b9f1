"""Typed reads of a model configuration: a key is there with the right type, or the error names it.

It knows the shape of HF's config.json as a mapping and nothing of any one architecture.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .. import ConfigError

_REQUIRED: Any = object()


class ConfigReader:
    """Reads keys of a mapping; a key that is absent or null takes the default, or is a `ConfigError` without one.

    values: the mapping, as parsed from JSON.
    where: what to call it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
        self._values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self._values.get(key) is not None

    def integer(self, key: str, default: int = _REQUIRED, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, f"an integer of at least {minimum}", value)
        return value

    def number(self, key: str, default: float = _REQUIRED, *, positive: bool = True) -> float:
        """A finite number, greater than 0 unless `positive` is false."""
        value = self._get(key, default)
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
        if not finite or (positive and value <= 0):
            raise self._wrong(key, "a positive number" if positive else "a number", value)
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers."""
        value = self._get(key, _REQUIRED)
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, f"a list of {length} numbers", value)
        return tuple(ConfigReader({f"{key}[{i}]": v}, self.where).number(f"{key}[{i}]") for i, v in enumerate(value))

    def boolean(self, key: str, default: bool = _REQUIRED) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def choice(self, key: str, allowed: Collection[str], default: str = _REQUIRED) -> str:
        """One of the strings in `allowed`."""
        value = self._get(key, default)
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(sorted(allowed))}", value)
        return str(value)

    def section(self, key: str) -> "ConfigReader":
        """The object under `key`; an empty one if it is absent."""
        return ConfigReader(self._get(key, {}), f"{self.where}: {key}")

    def refuse(self, key: str, reason: str) -> None:
        """Raise unless `key` is absent, null, false or empty: its presence would change the mathematics."""
        if self._values.get(key):
            raise self.error(f"{key} = {self._values[key]!r} is not supported: {reason}")

    def error(self, message: str) -> ConfigError:
        """The error to raise for a value that only its reader can judge."""
        return ConfigError(f"{self.where}: {message}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(f"the key {key!r} is missing")
        return default

    def _wrong(self, key: str, wanted: str, found: Any) -> ConfigError:
        return self.error(f"{key} must be {wanted}, found {found!r}")
