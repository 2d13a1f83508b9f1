"""Mistral: Llama whose attention sees a sliding window in every layer, if the configuration sets one."""

from collections.abc import Mapping
from typing import Any

from .architecture import Architecture
from .config import ConfigReader
from .llama import LLAMA, Llama, LlamaConfig


def read_config(values: Mapping[str, Any]) -> LlamaConfig:
    """Read config.json; `sliding_window` null is the whole past, and absent what HF takes then."""
    read = ConfigReader(values)
    for key in ("attention_bias", "mlp_bias"):
        read.refuse(key, "Mistral has no biases")
    return LlamaConfig.read_windowed(read, read.integer_or_off("sliding_window", 4096))


MISTRAL = Architecture(
    names=("MistralForCausalLM",),
    read_config=read_config,
    build=Llama,
    ignored=LLAMA.ignored,  # llama.cpp writes Mistral as `llama`
)
