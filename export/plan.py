"""What a build will take, before it starts: disk, memory, and what a token costs at run time.

Estimates are upper bounds from the tensors' sizes and constants measured on the build itself; a build that cannot
fit is refused here, not after minutes.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from .. import BuildError
from ..models.architecture import CausalModel
from ..models.cache import KvShape
from ..models.layers import BlockQuantizedWeight, QLinear
from ..models.quantize import count_weights
from ..runtime.manifest import Limits
from .lower.quantized import Correction

_TOOLS_BYTES = 800 << 20  # torch, onnx and the exporter, resident
_GRAPH_BYTES_PER_LAYER = 1 << 20  # traced and translated graph, in memory
_FILES_BYTES = 32 << 20  # tokenizer, graphs, manifest
_GOLDEN_TOKENS = 4 * 128  # the prompts of the proof, padded: the eager model gives logits of each, and they are kept
_CALIBRATION_TOKENS = 40 * 128  # rows that calibrate an int8 cache, padded, whose states are kept; SmolLM2 makes 28
_ITEM = 4  # bytes of an element: the engine computes in float32


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, unless said otherwise.

    bundle: on disk. build_memory: peak resident memory of the build itself. engine_memory: of the engine with one
    row of full capacity, which the proof needs too. kv_per_token: of one row. scratch: of a temporary file beside it.
    """

    parameters: int
    bundle: int
    build_memory: int
    engine_memory: int
    kv_per_token: int
    provable: bool
    why_not_provable: str
    scratch: int = 0

    def require(self, destination: Path) -> None:
        """Raise `BuildError` if the disk of `destination` or this host's memory is too small."""
        parent = next(p for p in (destination, *destination.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if self.bundle + self.scratch > free:
            meanwhile = f" and {gigabytes(self.scratch)} while it is built" if self.scratch else ""
            needed = gigabytes(self.bundle) + meanwhile
            raise BuildError(f"the bundle needs {needed}, the disk of {parent} has {gigabytes(free)}")
        available = psutil.virtual_memory().available
        if self.build_memory > available:
            raise BuildError(
                f"the build needs {gigabytes(self.build_memory)} of memory, {gigabytes(available)} are available"
            )


def make_plan(
    model: CausalModel, limits: Limits, quality: str = "exact", *, kv: str = "float32", quantizes: bool = False
) -> Plan:
    """Predict.

    Args:
        model: on the meta device.
        limits: of the engine.
        quality: the class asked for.
        kv: dtype of the engine's cache.
        quantizes: whether the build puts floats into blocks, which it keeps in a file until it is done.
    """
    unique = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    largest, weights = max(unique.values()), sum(unique.values())
    if quality != "exact":
        weights += sum(_correction_bytes(m) for m in model.modules() if isinstance(m, QLinear))
    if quality == "fast":
        rounded = [
            _rounded_bytes(m) for m in model.modules() if isinstance(m, QLinear) and m.shape[0] != limits.vocab_size
        ]
        largest, weights = max([largest, *rounded]), weights + sum(rounded)
    shapes = model.kv_shapes
    token = kv_bytes_per_token(shapes, kv)
    row = token * (limits.capacity + limits.max_chunk)
    # mapped weights, their packed copies, a row of cache, logits and activations of a chunk
    engine = 2 * weights + row + limits.vocab_size * _ITEM * limits.max_batch + (256 << 20)
    golden = _GOLDEN_TOKENS * (3 * limits.vocab_size * _ITEM + kv_bytes_per_token(shapes))
    calibration = _CALIBRATION_TOKENS * kv_bytes_per_token(shapes) if kv == "int8" else 0
    build = _TOOLS_BYTES + len(shapes) * _GRAPH_BYTES_PER_LAYER + 2 * largest + max(golden, calibration)
    available = psutil.virtual_memory().available
    needed = _TOOLS_BYTES + engine
    provable = needed <= available
    why_not = "" if provable else f"it needs {gigabytes(needed)} of memory, the build host had {gigabytes(available)}"
    peak = max(build, needed) if provable else build
    scratch = _blocks_bytes(model) if quantizes else 0
    return Plan(count_weights(model), weights + _FILES_BYTES, peak, engine, token, provable, why_not, scratch)


def _blocks_bytes(model: CausalModel) -> int:
    """Of all block-quantised weights, shared ones once."""
    held = (m for m in model.modules() if isinstance(m, BlockQuantizedWeight))
    parts = {id(p): p.nbytes for m in held for p in (m.codes, m.scales, m.offsets) if p is not None}
    return sum(parts.values())


def _rounded_bytes(linear: QLinear) -> int:
    """Of what the prefill graph of the quality `fast` has of a linear: a byte a weight, a scale a row."""
    rows, columns = linear.shape
    return rows * (columns + _ITEM)


def _correction_bytes(linear: QLinear) -> int:
    """Of the columns that stand for a linear's offsets."""
    if linear.offsets is None:
        return 0
    rows, offsets = linear.offsets.shape
    correction = Correction(linear.form.bits, linear.form.block_size, offsets)
    return rows * (correction.code_bytes + correction.columns // correction.block_size * _ITEM)


def kv_bytes_per_token(shapes: list[KvShape], dtype: str = "float32") -> int:
    """Bytes of cache that one token of one row takes, all layers together."""
    return sum(s.num_key_value_heads * (s.key_dim + s.value_dim) for s in shapes) * np.dtype(dtype).itemsize


def gigabytes(size: int) -> str:
    """`1.2 GB`, `340 MB`, `46 kB`: decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{size} bytes"
