"""The list of architectures. Adding a model: write its file, add its line here."""

from collections.abc import Mapping
from typing import Any

from .. import ConfigError, UnsupportedArchitectureError
from .architecture import Architecture
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gpt_oss import GPT_OSS
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .phi import PHI
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI,
    PHI3,
    STARCODER2,
    STABLELM,
    OLMO2,
    GRANITE,
    SMOLLM3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
)

GUIDE = "docs/adding-a-model.md"


def find(name: str) -> Architecture:
    """Return the architecture that serves the HF class name `name` (`LlamaForCausalLM`).

    Raises:
        UnsupportedArchitectureError: none does; the message lists the ones that exist.
    """
    for architecture in ARCHITECTURES:
        if name in architecture.names:
            return architecture
    raise _unsupported(name, sorted(n for a in ARCHITECTURES for n in a.names))


def of_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that an HF config.json names under `architectures`.

    Raises:
        ConfigError: it names none.
        UnsupportedArchitectureError: none of those named is supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("config.json: architectures must be a list with the model's class name")
    return find(names[0])


def find_gguf(name: str, *, experts: bool = False) -> Architecture:
    """Return the architecture whose GGUF `general.architecture` is `name`.

    Args:
        name: as the file has it.
        experts: whether the file has any; it decides where a name is that of two architectures.

    Raises:
        UnsupportedArchitectureError: none does; the message lists the ones that exist.
    """
    layouts = [(a.gguf, a) for a in ARCHITECTURES if a.gguf is not None]
    found = [(layout, architecture) for layout, architecture in layouts if layout.name == name]
    if not found:
        raise _unsupported(name, sorted({layout.name for layout, _ in layouts}))
    return min(found, key=lambda pair: pair[0].experts != experts)[1]


def _unsupported(name: str, known: list[str]) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"architecture {name!r} is not supported; supported: {', '.join(known)}. To add it, see {GUIDE}"
    )
