"""Typed reads of a model configuration: a key is there with the right type, or the error names it.

It knows the shape of HF's config.json as a mapping and nothing of any one architecture.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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

    def integer(self, key: str, default: int = _REQUIRED, *, minimum: int = 1, maximum: int | None = None) -> int:
        """An integer of at least `minimum` and at most `maximum`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, f"an integer of at least {minimum}", value)
        if maximum is not None and value > maximum:
            raise self._wrong(key, f"an integer of at most {maximum}", value)
        return value

    def number(self, key: str, default: float = _REQUIRED, *, positive: bool = True) -> float:
        """A finite number, greater than 0 unless `positive` is false."""
        value = self._get(key, default)
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not finite or (positive and value <= 0):
            raise self._wrong(key, "a positive number" if positive else "a number", value)
        return float(value)

    def integer_or_off(self, key: str, default: int) -> int:
        """An integer of at least 1; `default` if `key` is absent, 0 if it is null."""
        return self.integer(key) if self.has(key) else (0 if key in self._values else default)

    def number_or_off(self, key: str, default: float) -> float:
        """A positive number; `default` if `key` is absent, 0 if it is null."""
        return self.number(key) if self.has(key) else (0.0 if key in self._values else default)

    def integers(self, key: str, length: int | None, default: Sequence[int]) -> tuple[int, ...]:
        """A list of `length` integers, none negative; of any number of them if it is None."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or length not in (None, len(value)):
            raise self._wrong(key, "a list of integers" if length is None else f"a list of {length} integers", value)
        items = ConfigReader({f"{key}[{i}]": v for i, v in enumerate(value)}, self.where)
        return tuple(items.integer(f"{key}[{i}]", minimum=0) for i in range(len(value)))

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

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def choice(self, key: str, allowed: Collection[str], default: str = _REQUIRED) -> str:
        """One of the strings in `allowed`."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(key, f"one of {', '.join(sorted(allowed))}", value)
        return value

    def texts(self, key: str, default: Sequence[str] = _REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key, default if default is _REQUIRED else list(default))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings", value)
        return tuple(value)

    def choices(self, key: str, length: int, allowed: Collection[str], default: Sequence[str]) -> tuple[str, ...]:
        """A list of `length` strings out of `allowed`."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or len(value) != length or not all(v in allowed for v in value):
            raise self._wrong(key, f"a list of {length} out of {', '.join(sorted(allowed))}", value)
        return tuple(value)

    def names(self) -> list[str]:
        """The keys that there are."""
        return list(self._values)

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


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What every decoder's config.json says, under HF's names; a family's dataclass adds its own."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool


def read_decoder(read: ConfigReader, *, tie_word_embeddings: bool = False) -> dict[str, Any]:
    """The fields of `DecoderConfig`; `tie_word_embeddings` is what the family does when the key is absent.

    Raises:
        ConfigError: a key is missing, or heads and sizes do not divide.
    """
    read.refuse("quantization_config", "load the checkpoint in its float form")
    hidden_size, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if not read.has("head_dim") and hidden_size % heads:
        raise read.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise read.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": read.integer("intermediate_size"),
        "num_hidden_layers": read.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": read.integer("head_dim", hidden_size // heads),
        "max_position_embeddings": read.integer("max_position_embeddings", 2048),
        "tie_word_embeddings": read.boolean("tie_word_embeddings", tie_word_embeddings),
    }


def read_windows(read: ConfigReader, window: int, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Each layer's attention window, 0 for the whole past.

    Args:
        read: the configuration; its `layer_types`, if there are any, say which layers slide.
        window: of the layers that slide, 0 if the configuration has none.
        sliding: which layers slide where the configuration does not say.

    Raises:
        ConfigError: an unknown layer type, or layers that slide without a window.
    """
    kinds = ("full_attention", "sliding_attention")
    types = read.choices("layer_types", len(sliding), kinds, [kinds[slides] for slides in sliding])
    if kinds[1] in types and not window:
        raise read.error("layer_types has sliding_attention, but sliding_window is not set")
    return tuple(window if kind == kinds[1] else 0 for kind in types)
