"""docs/models.md, written from the registry: `python -m zonda.models.describe > docs/models.md`.

What an architecture refuses is found by asking: its `read_config` gets a small configuration in which one key after the
other holds a value that nobody supports.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

from .. import ConfigError
from . import rope
from .architecture import Architecture
from .checkpoints import quantized
from .registry import ARCHITECTURES

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {},
}
_NOBODYS = "?"
_REFUSED = re.compile(r"config\.json: (?P<key>\w+) = '\?' is not supported: (?P<reason>.*)")
_CHOICE = re.compile(r"config\.json: (?P<key>\w+) must be one of (?P<allowed>.*), found '\?'")
_OF_FORMATS = "quantization_config"  # refused by all, but gone where `checkpoints/quantized.py` has read it

_PAGE = """# Models

Written by `python -m zonda.models.describe` from the registry; a test compares. To add one, see
[adding a model](adding-a-model.md).

| model | what it is | `architectures` in config.json | GGUF | refused |
|---|---|---|---|---|
{rows}

Scalings of RoPE: {ropes} (`factors` are GGUF's).

Checkpoints: folders with safetensors, one file or shards, and hub ids, their `quantization_config` if there is one with
the method {methods}; GGUF files. LoRA adapters of PEFT are merged with `--lora PATH[:SCALE]`.
"""


class _Recorder(dict[str, Any]):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: dict[str, None] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = None
        return super().get(key, default)


def page() -> str:
    """docs/models.md."""
    return _PAGE.format(
        rows="\n".join(map(_row, ARCHITECTURES)),
        ropes=", ".join(f"`{kind}`" for kind in sorted(rope.SCALINGS)),
        methods=" or ".join(f"`{method}`" for method in quantized.METHODS),
    )


def refusals(architecture: Architecture) -> Iterator[str]:
    """What its configuration may not hold, in words: keys that must be off, and keys with few values.

    Raises:
        ConfigError: the family needs a key that `_SMALL` lacks.
    """
    recorder = _Recorder(_SMALL)
    architecture.read_config(recorder)
    for key in recorder.asked:
        if key == _OF_FORMATS:
            continue
        try:
            architecture.read_config({**_SMALL, key: _NOBODYS})
        except ConfigError as error:
            if found := _REFUSED.fullmatch(str(error)):
                yield f"`{key}`: {found['reason']}"
            elif found := _CHOICE.fullmatch(str(error)):
                yield f"`{key}` other than {found['allowed']}"


def _row(architecture: Architecture) -> str:
    module = sys.modules[architecture.read_config.__module__]
    title, _, description = (module.__doc__ or "").partition("\n")[0].rstrip(".").replace("|", "\\|").partition(": ")
    file = module.__name__.rpartition(".")[2]
    names = ", ".join(f"`{name}`" for name in architecture.names)
    gguf = f"`{architecture.gguf.name}`" if architecture.gguf else "no"
    refused = "; ".join(refusals(architecture)) or "nothing more"
    return f"| [{title}](../models/{file}.py) | {description} | {names} | {gguf} | {refused} |"


if __name__ == "__main__":
    print(page(), end="")
