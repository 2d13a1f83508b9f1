"""Zonda: language models compiled ahead of time, on ONNX and TensorRT.

The package is the repository root. Its rooms are `models` (torch definitions with markers), `export` (torch to
ONNX to a target), `plugins_trt` (TensorRT plugins) and `runtime` (what runs in production: no torch, no onnx).
This file imports nothing, so `import zonda` is free; it holds the version and the errors that every room raises.
"""

__version__ = "0.1.0"


class ZondaError(Exception):
    """Base of every error that Zonda raises on purpose. Its message names the culprit and the remedy."""


class ConfigError(ZondaError):
    """A model configuration lacks a key, or holds a value that would change the mathematics and is not supported."""


class UnsupportedArchitectureError(ConfigError):
    """The checkpoint's architecture has no entry in the registry."""


class CheckpointError(ZondaError):
    """A checkpoint is missing, truncated, corrupt, unsafe, or does not fit the model."""


class BuildError(ZondaError):
    """A build was refused before it began, or failed; no bundle was written."""


class ParityError(BuildError):
    """The compiled engine does not compute what the eager model computes."""


class BundleError(ZondaError):
    """An engine bundle is missing, incomplete, altered, or of a schema that this version cannot read."""


class TargetUnavailableError(ZondaError):
    """No target of the bundle can run on this host; the message says why, one line a target."""


class EngineError(ZondaError):
    """The engine refused a step, or failed in one."""


class CapacityError(EngineError):
    """More tokens or rows were asked for than the engine's KV cache holds."""


class DeviceMemoryError(EngineError):
    """The GPU has not enough free memory; the message holds the numbers, and so do the attributes, in bytes.

    needed: None where TensorRT asked and did not say how much.
    """

    def __init__(self, message: str, *, needed: int | None, free: int, total: int) -> None:
        super().__init__(message)
        self.needed, self.free, self.total = needed, free, total


class RequestError(ZondaError):
    """A request is empty, contradictory, or carries an unknown option."""


class ChatTemplateError(ZondaError):
    """A chat template is missing, malformed, unsafe, or did not finish within its budget."""
