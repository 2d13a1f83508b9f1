"""ONNX Runtime on the CPU: everything bound once, the KV cache updated in place.

Inputs and logits live in buffers whose addresses never change; a binding a (cache, rows) pair holds the 2L state
tensors, and a step only writes the small inputs and, when its shape differs from the last, binds them again.
"""

import itertools
import math
import mmap
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ... import BundleError, EngineError
from .. import contract
from ..manifest import Contract, Limits
from . import Float32, Int32, Int64, KvCache, check_step
from .ort import onnxruntime as ort

_ALIGNMENT = 64


class HostKvCache:
    """KV buffers in host memory: one (rows, Hkv, C, D) array a state tensor, C = capacity + max_chunk.

    The tail is scratch, so that a padded chunk always fits. The arrays are views of one anonymous mapping, whose
    pages are zero and are taken as tokens arrive. (numpy's own zeros asks for huge pages, and then the first token of
    each head takes 2 MB.)
    """

    def __init__(self, spec: Contract, limits: Limits, rows: int) -> None:
        dimensions = {contract.BATCH: rows, contract.CAPACITY: limits.capacity + limits.max_chunk}
        self.rows = rows
        shapes = [tuple(dimensions[d] if isinstance(d, str) else d for d in state.shape) for state in spec.states]
        sizes = [math.prod(shape) * np.dtype(s.dtype).itemsize for shape, s in zip(shapes, spec.states, strict=True)]
        places = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
        memory = mmap.mmap(-1, places[-1])
        self.buffers = [
            np.frombuffer(memory, state.dtype, math.prod(shape), place).reshape(shape)
            for state, shape, place in zip(spec.states, shapes, places[:-1], strict=True)
        ]
        self.bindings: dict[tuple[int, int], _Binding] = {}

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `KvCache`."""
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]


class _Binding:
    """An IOBinding over some rows of a cache, and the shape its small tensors were last bound with."""

    def __init__(self, io: ort.IOBinding) -> None:
        self.io = io
        self.shape: tuple[int, ...] = ()


class OnnxRuntimeEngine:
    """See `Engine`. One session, one set of input buffers: hold `lock` around a step and the use of its logits."""

    def __init__(self, model: Path, spec: Contract, limits: Limits, *, threads: int | None = None) -> None:
        """Open a session.

        Args:
            model: the lowered graph; its weights lie beside it and are mapped.
            spec: the contract from the manifest.
            limits: capacity, rows and chunk to serve.
            threads: compute threads; None is one a physical core.

        Raises:
            BundleError: ONNX Runtime cannot read the graph.
            EngineError: the graph wants an input that this engine does not know.
        """
        known = {*contract.INPUTS}
        unknown = [tensor.role for tensor in spec.inputs if tensor.role not in known]
        if unknown or spec.layout != contract.LAYOUT:
            raise EngineError(f"this engine cannot feed {unknown or spec.layout}; use the zonda version that built it")
        self.limits = limits
        self.lock = threading.Lock()
        self._spec = spec
        self._names = {tensor.role: tensor.name for tensor in spec.inputs}
        self._session: ort.InferenceSession | None = _open_session(model, threads)
        tokens = limits.max_batch * limits.max_chunk
        self._inputs = {
            role: np.zeros(tokens if len(shape) == 2 else limits.max_batch, dtype)
            for role, (dtype, shape) in contract.INPUTS.items()
        }
        self._views: dict[tuple[int, ...], dict[str, Any]] = {}
        self._logits = np.empty((limits.max_batch, limits.vocab_size), np.float32)
        self._steps = np.arange(limits.max_chunk)

    def allocate(self, rows: int) -> HostKvCache:
        """See `Engine`."""
        return HostKvCache(self._spec, self.limits, rows)

    def step(
        self,
        cache: KvCache,
        first_row: int,
        input_ids: Int64,
        seqlen_offsets: Int32,
        input_lens: Int32,
        logit_positions: Int64,
    ) -> Float32:
        """See `Engine`."""
        if self._session is None:
            raise EngineError("the engine is closed")
        if not isinstance(cache, HostKvCache):
            raise EngineError("the cache belongs to another engine")
        check_step(self.limits, cache.rows, first_row, input_ids, seqlen_offsets, input_lens, logit_positions)
        shape = (*input_ids.shape, logit_positions.shape[1])
        if shape[0] * shape[2] > len(self._logits):
            self._logits = np.empty((shape[0] * shape[2], self.limits.vocab_size), np.float32)
            self._views.clear()
        views = self._views.get(shape) or self._make_views(shape)
        views[contract.INPUT_IDS][...] = input_ids
        views[contract.SEQLEN_OFFSETS][...] = seqlen_offsets
        views[contract.INPUT_LENS][...] = input_lens
        views[contract.LOGIT_POSITIONS][...] = logit_positions
        np.add(seqlen_offsets[:, None], self._steps[: shape[1]], out=views[contract.START_OFFSETS_KERNEL])
        binding = cache.bindings.get((first_row, shape[0])) or self._bind_states(cache, first_row, shape[0])
        logits: Float32 = views[contract.LOGITS]
        if binding.shape != (*shape, logits.ctypes.data):
            self._bind_inputs(binding, views)
            binding.shape = (*shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:  # ONNX Runtime raises its own unnamed types
            raise EngineError(f"ONNX Runtime failed in a step of shape {shape}: {error}") from error
        return logits

    def close(self) -> None:
        """See `Engine`."""
        self._session = None

    def _make_views(self, shape: tuple[int, ...]) -> dict[str, Any]:
        batch, length, num_logits = shape
        sizes = {contract.BATCH: batch, contract.SEQUENCE: length, contract.NUM_LOGITS: num_logits}
        views = {}
        for role, (_, dims) in contract.INPUTS.items():
            extent = tuple(sizes[d] for d in dims)
            views[role] = self._inputs[role][: int(np.prod(extent))].reshape(extent)
        views[contract.LOGITS] = self._logits[: batch * num_logits].reshape(batch, num_logits, -1)
        self._views[shape] = views
        return views

    def _bind_states(self, cache: HostKvCache, first_row: int, batch: int) -> _Binding:
        assert self._session is not None
        io = self._session.io_binding()
        for state, buffer in zip(self._spec.states, cache.buffers, strict=True):
            rows = buffer[first_row : first_row + batch]
            arguments = ("cpu", 0, rows.dtype.type, rows.shape, rows.ctypes.data)
            io.bind_input(state.input, *arguments)
            io.bind_output(state.output, *arguments)
        binding = cache.bindings[first_row, batch] = _Binding(io)
        return binding

    def _bind_inputs(self, binding: _Binding, views: dict[str, Any]) -> None:
        for role, name in self._names.items():
            view = views[role]
            binding.io.bind_input(name, "cpu", 0, view.dtype.type, view.shape, view.ctypes.data)
        logits = views[contract.LOGITS]
        binding.io.bind_output(self._spec.logits.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)


def _open_session(model: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unnamed types
        raise BundleError(f"{model}: ONNX Runtime cannot open the graph: {error}") from error
