"""What passes between a build and the process in which TensorRT builds; knows neither torch nor TensorRT."""

from typing import Literal

import msgspec

from ..plugins_trt.trt import Flavour

Range = tuple[int, int, int]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One optimisation profile: (minimum, best, maximum) of each dynamic dimension, by its name in the contract."""

    role: Literal["prefill", "decode"]
    dimensions: dict[str, Range]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker is to do; paths are absolute.

    onnx: the graph. plan, log: files to write. kernels: file of the cubins. operators: that
    take their plugin. plugins: every node that must become
    a plugin layer: its name, and its float attributes. cache_updates: nodes that must become KV_CACHE_UPDATE.
    """

    module: Flavour
    onnx: str
    plan: str
    log: str
    kernels: str
    capabilities: tuple[int, ...]
    profiles: tuple[Profile, ...]
    operators: tuple[str, ...]
    plugins: dict[str, dict[str, float]]
    cache_updates: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was built.

    activations, weights: bytes on the device, as TensorRT says: of each profile, and of the plan.
    version: of TensorRT. layers: kind -> count, as parsed. plugin_layers: their names. profiles: how many.
    warnings: of TensorRT, in words, each once. peak_memory: bytes, of the worker.
    """

    version: str
    layers: dict[str, int]
    plugin_layers: tuple[str, ...]
    profiles: int
    plan_bytes: int
    seconds: float
    activations: tuple[int, ...]
    weights: int
    peak_memory: int
    warnings: tuple[str, ...]
