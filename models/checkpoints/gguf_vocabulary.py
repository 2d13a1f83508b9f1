"""The vocabulary in a GGUF's metadata: tokens, what each is, and typed reads that name the key and the file."""

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from ... import CheckpointError

_NO_TOKEN = 0xFFFFFFFF
_UNSAID = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}  # what llama.cpp takes where a file names none, by model


class TokenType(IntEnum):
    """What a token is: GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def token_id(path: Path, metadata: Mapping[str, Any], name: str) -> int | None:
    """The number under `tokenizer.ggml.{name}_token_id`, None where there is none.

    Raises:
        CheckpointError: it is no token's number.
    """
    model = metadata.get("tokenizer.ggml.model")
    unsaid = _UNSAID.get(model, {}) if isinstance(model, str) else {}
    value = metadata.get(f"tokenizer.ggml.{name}_token_id", unsaid.get(name))
    if value is None or value == _NO_TOKEN:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id is {value!r}, the number of none of its tokens")
    return value


class Vocabulary:
    """Tokens and types of a file, and what else is under `tokenizer.ggml.`.

    tokens: by number; an empty entry gets the name that llama.cpp gives it. types: what each of them is.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Read and check.

        Raises:
            CheckpointError: there is none, a token is there twice, or not every token has a type.
        """
        self.path = path
        self.metadata = metadata
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.sequence("tokens", str))]
        self.types: list[int] = self.sequence("token_type", int)
        if len(set(self.tokens)) != len(self.tokens):
            raise self.error("tokenizer.ggml.tokens names a token twice")
        if len(self.types) != len(self.tokens):
            counts = f"there are {len(self.tokens):,} tokens, but tokenizer.ggml.token_type has {len(self.types):,}"
            raise self.error(f"{counts} entries")

    def of_type(self, *types: TokenType) -> dict[str, int]:
        """The tokens of these types, with their numbers."""
        return {token: i for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind in types}

    def id(self, name: str) -> int | None:
        """See `token_id`."""
        return token_id(self.path, self.metadata, name)

    def sequence(self, key: str, *kinds: type) -> list[Any]:
        """The list under `tokenizer.ggml.{key}`, of elements of one of `kinds`."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or (value and type(value[0]) not in kinds):  # arrays have one type
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(f"tokenizer.ggml.{key} is missing, or no list of {wanted}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false, under `tokenizer.ggml.{key}`."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise self.error(f"tokenizer.ggml.{key} is neither true nor false")
        return value

    def error(self, message: str) -> CheckpointError:
        """The error to raise for what only the caller can judge."""
        return CheckpointError(f"{self.path}: {message}")
