"""TensorRT plugins of the markers: kernels compiled ahead of time, and the classes through which TensorRT calls them.

One file a marker, named as in `models/ops/`, and its Triton kernel under the same name in `kernels/`. To build:
`variants_of` a graph, `compile_kernels` for the engine's compute capabilities, `load` a TensorRT, `register`. To
serve: `CubinLibrary.from_bytes`, `load`, `register`. Importing this package imports neither TensorRT nor Triton nor
CUDA; serving needs neither Triton nor a compiler.
"""

from .compile import compile_kernels
from .cubins import CAPABILITIES, Cubin, CubinLibrary, Variant
from .nodes import variants_of
from .registry import PLUGINS, Registration, register
from .trt import load

__all__ = [
    "CAPABILITIES",
    "PLUGINS",
    "Cubin",
    "CubinLibrary",
    "Registration",
    "Variant",
    "compile_kernels",
    "load",
    "register",
    "variants_of",
]
