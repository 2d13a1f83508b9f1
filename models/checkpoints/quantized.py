"""Folders whose config.json has a `quantization_config`: which methods are read, and by what."""

from collections.abc import Callable, Mapping

from ... import ConfigError
from ..config import ConfigReader
from .awq import read_awq
from .base import Checkpoint
from .fp8 import read_compressed_tensors, read_fp8
from .gptq import read_gptq
from .packed import Packed, UnpackedCheckpoint

METHODS: Mapping[str, Callable[[Checkpoint, ConfigReader], Packed]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
}


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each quantised weight as one tensor; the same if its configuration names no quantisation.

    Raises:
        ConfigError: it names a method, or an option of one, that is not read; the message lists those that are.
        CheckpointError: tensors of a weight are missing, or do not fit each other.
    """
    if checkpoint.config.get("quantization_config") is None:
        return checkpoint
    read = ConfigReader(checkpoint.config).section("quantization_config")
    method = read.text("quant_method")
    if method not in METHODS:
        raise ConfigError(
            f"{read.where}: quant_method {method!r} is not supported; supported: {', '.join(METHODS)}, and GGUF. "
            "Load the checkpoint in its float form"
        )
    return UnpackedCheckpoint(checkpoint, METHODS[method](checkpoint, read))
