"""ONNX Runtime, on the CPU or by its CUDA provider: everything bound once, the KV cache updated in place.

Inputs and logits live in buffers whose addresses never change; a binding a (cache, rows) pair holds the 2L state
tensors, and a step only writes the small inputs and, when its shape differs from the last, binds them again. With
CUDA the KV cache is in GPU memory, and ONNX Runtime copies the small inputs and the logits.
"""

import functools
import itertools
import math
import mmap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ... import EngineError
from .. import contract
from ..manifest import Contract, Limits
from . import Float32, Int32, Int64, KvCache, check_step
from .cache_forms import StateForm, read_forms
from .ort import onnxruntime as ort
from .ort_session import Provider, open_session

if TYPE_CHECKING:
    from .cuda_memory import Device
    from .device_cache import DeviceKvCache

_ALIGNMENT = 64
_SHORT = 8  # tokens a row up to which a step has a binding of its own and its inputs are written number by number


class HostKvCache:
    """KV buffers in host memory: one (rows, Hkv, C, D) array a state tensor, C = capacity + max_chunk.

    The tail is scratch, so that a padded chunk always fits. The arrays are views of one anonymous mapping, whose
    pages are zero and are taken as tokens arrive. (numpy's own zeros asks for huge pages, and then the first token of
    each head takes 2 MB.)
    """

    def __init__(
        self, spec: Contract, limits: Limits, rows: int, forms: Callable[[], Sequence[StateForm]] | None = None
    ) -> None:
        """Allocate.

        Args:
            spec: whose states they are.
            limits: capacity and chunk.
            rows: how many.
            forms: gives the form of each state, if they hold codes.
        """
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
        self.bindings: dict[tuple[int, ...], _Binding] = {}
        self._forms = forms

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `KvCache`."""
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def read(self, row: int, length: int) -> list[NDArray[Any]]:
        """See `KvCache`."""
        held = [buffer[row, :, :length] for buffer in self.buffers]
        if self._forms is None:
            return held
        return [form.widen(codes) for codes, form in zip(held, self._forms(), strict=True)]


class _StepBuffers:
    """The engine's input and logits buffers, seen as the tensors of one step shape (B, S, K)."""

    def __init__(self, inputs: dict[str, NDArray[Any]], logits: Float32, shape: tuple[int, int, int]) -> None:
        batch, length, num_logits = shape
        sizes = {contract.BATCH: batch, contract.SEQUENCE: length, contract.NUM_LOGITS: num_logits}
        self.inputs = {}
        for role, (_, dims) in contract.INPUTS.items():
            extent = tuple(sizes[d] for d in dims)
            self.inputs[role] = inputs[role][: math.prod(extent)].reshape(extent)
        self.input_ids = self.inputs[contract.INPUT_IDS]
        self.seqlen_offsets = self.inputs[contract.SEQLEN_OFFSETS]
        self.start_offsets_kernel = self.inputs[contract.START_OFFSETS_KERNEL]
        self.input_lens = self.inputs[contract.INPUT_LENS]
        self.logit_positions = self.inputs[contract.LOGIT_POSITIONS]
        self._steps = np.arange(length)
        # In the order of contract.INPUTS.
        self._ids, self._offsets, self._starts, self._lens, self._positions = (
            view.reshape(-1).data for view in self.inputs.values()
        )
        self.logits: Float32 = logits[: batch * num_logits].reshape(batch, num_logits, -1)
        self.values = {role: _share(view) for role, view in self.inputs.items()}
        self.logits_value = _share(self.logits)

    def write(self, input_ids: Int64, seqlen_offsets: Int32, input_lens: Int32, logit_positions: Int64) -> None:
        """Set a step's inputs."""
        self.input_ids[...] = input_ids
        self.seqlen_offsets[...] = seqlen_offsets
        self.input_lens[...] = input_lens
        self.logit_positions[...] = logit_positions
        np.add(seqlen_offsets[:, None], self._steps, out=self.start_offsets_kernel)

    def write_few(self, tokens: list[int], offsets: list[int], lens: list[int], positions: list[int]) -> None:
        """`write`, of flat lists, without numpy: between two steps its code is no longer in the processor's caches."""
        length = len(tokens) // len(offsets)
        for i, token in enumerate(tokens):
            self._ids[i] = token
            self._starts[i] = offsets[i // length] + i % length
        for row, offset in enumerate(offsets):
            self._offsets[row] = offset
            self._lens[row] = lens[row]
        for i, position in enumerate(positions):
            self._positions[i] = position


class _Binding:
    """An IOBinding over some rows of a cache, and the step buffers it was last bound to."""

    def __init__(self, io: ort.IOBinding) -> None:
        self.io = io
        self.buffers: _StepBuffers | None = None


class OnnxRuntimeEngine:
    """See `Engine`. One set of input buffers: hold `lock` around a step and the use of its logits.

    One session, or a second one for long steps, which works on the same inputs, logits and caches.
    """

    def __init__(
        self,
        model: Path,
        spec: Contract,
        limits: Limits,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        cuda: Any = None,
        as_stored: bool = False,
        prefill: tuple[Path, int] | None = None,
        cache_forms: Path | None = None,
    ) -> None:
        """Open the session, or both: a request begins with its prefill, and a graph that is broken shows here.

        Args:
            model: the lowered graph, for `cuda` the universal one; its weights lie beside it and are mapped.
            spec: the contract from the manifest.
            limits: capacity, rows and chunk to serve.
            threads: compute threads; None is one a physical core.
            provider: where it runs.
            cuda: `cuda.bindings.driver`, or what stands in for it; for `cuda` only.
            as_stored: slower, with half the memory: see `open_session`.
            prefill: another graph of the same contract, and the tokens a row from which on a step runs it.
            cache_forms: file that says how states in int8 are rounded, by which `KvCache.read` gives floats; it is
                opened when that is first called.

        Raises:
            BundleError: ONNX Runtime cannot read the graph.
            EngineError: the graph wants an input that this engine does not know, or there is no GPU.
            TargetUnavailableError: this ONNX Runtime has no such provider, or it does not work here.
        """
        known = {*contract.INPUTS}
        unknown = [tensor.role for tensor in spec.inputs if tensor.role not in known]
        if unknown or spec.layout != contract.LAYOUT:
            raise EngineError(f"this engine cannot feed {unknown or spec.layout}; use the zonda version that built it")
        self.limits = limits
        self.lock = threading.Lock()
        self._spec = spec
        self._names = {tensor.role: tensor.name for tensor in spec.inputs}
        self._forms = None if cache_forms is None else functools.cache(lambda: read_forms(cache_forms, spec.states))
        self._device: Device | None = None
        long, self._shortest_prefill = prefill or (None, limits.max_chunk + 1)
        self._sessions = [
            open_session(file, threads, provider, as_stored=as_stored, alternating=long is not None)
            for file in (model, long)
            if file is not None
        ]
        tokens = limits.max_batch * limits.max_chunk
        self._inputs = {
            role: np.zeros(tokens if len(shape) == 2 else limits.max_batch, dtype)
            for role, (dtype, shape) in contract.INPUTS.items()
        }
        self._logits = np.empty((limits.max_batch, limits.vocab_size), np.float32)
        self._buffers: dict[tuple[int, int, int], _StepBuffers] = {}
        if provider == "cuda":
            from . import cuda_memory

            self._device = cuda_memory.Device(cuda)

    def allocate(self, rows: int) -> "HostKvCache | DeviceKvCache":
        """See `Engine`. With CUDA, DeviceMemoryError if it does not fit."""
        if self._device is None:
            return HostKvCache(self._spec, self.limits, rows, self._forms)
        from .device_cache import DeviceKvCache, StateLayout

        positions = self.limits.capacity + self.limits.max_chunk
        layouts = []
        for state in self._spec.states:
            _, heads, _, dim = state.shape
            layouts.append(StateLayout(state.input, state.output, int(heads), positions, int(dim), state.dtype))
        return DeviceKvCache(self._device, layouts, rows)

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
        if not self._sessions:
            raise EngineError("the engine is closed")
        if not self._owns(cache):
            raise EngineError("the cache belongs to another engine")
        lists = check_step(self.limits, cache.rows, first_row, input_ids, seqlen_offsets, input_lens, logit_positions)
        batch, length = input_ids.shape
        shape = (batch, length, logit_positions.shape[1])
        buffers = self._buffers.get(shape) or self._make_buffers(shape)
        number = int(length >= self._shortest_prefill)
        if length <= _SHORT:
            buffers.write_few(*lists)
            key: tuple[int, ...] = (number, first_row, *shape)
        else:
            buffers.write(input_ids, seqlen_offsets, input_lens, logit_positions)
            key = (number, first_row, batch)
        binding = cache.bindings.get(key) or self._bind_states(cache, first_row, batch, key)
        if binding.buffers is not buffers:
            self._bind_buffers(binding, buffers)
        if self._device is not None:
            with self._device.entered():
                self._device.synchronize()  # copies of rows; ONNX Runtime works on a stream of its own
        try:
            self._sessions[number].run_with_iobinding(binding.io)
        except Exception as error:  # ONNX Runtime raises its own unnamed types
            raise EngineError(f"ONNX Runtime failed in a step of shape {shape}: {error}") from error
        return buffers.logits

    def close(self) -> None:
        """See `Engine`."""
        self._sessions.clear()
        if self._device is not None:
            self._device.close()

    def _make_buffers(self, shape: tuple[int, int, int]) -> _StepBuffers:
        rows = shape[0] * shape[2]
        if rows > len(self._logits):
            self._logits = np.empty((rows, self.limits.vocab_size), np.float32)
            self._buffers.clear()
        buffers = self._buffers[shape] = _StepBuffers(self._inputs, self._logits, shape)
        return buffers

    def _owns(self, cache: KvCache) -> "TypeGuard[HostKvCache | DeviceKvCache]":
        if self._device is None:
            return isinstance(cache, HostKvCache)
        return getattr(cache, "device", None) is self._device

    def _bind_states(
        self, cache: "HostKvCache | DeviceKvCache", first_row: int, batch: int, key: tuple[int, ...]
    ) -> _Binding:
        io = self._sessions[key[0]].io_binding()
        if not isinstance(cache, HostKvCache):
            for layout, address in zip(cache.layouts, cache.addresses(first_row), strict=True):
                shape = (batch, layout.heads, layout.positions, layout.dim)
                io.bind_input(layout.input, "cuda", 0, np.dtype(layout.dtype), shape, address)
                io.bind_output(layout.output, "cuda", 0, np.dtype(layout.dtype), shape, address)
            cache.bindings[key] = bound = _Binding(io)
            return bound
        for state, buffer in zip(self._spec.states, cache.buffers, strict=True):
            rows = _share(buffer[first_row : first_row + batch])
            io.bind_ortvalue_input(state.input, rows)
            io.bind_ortvalue_output(state.output, rows)
        binding = cache.bindings[key] = _Binding(io)
        return binding

    def _bind_buffers(self, binding: _Binding, buffers: _StepBuffers) -> None:
        for role, name in self._names.items():
            binding.io.bind_ortvalue_input(name, buffers.values[role])
        binding.io.bind_ortvalue_output(self._spec.logits.name, buffers.logits_value)
        binding.buffers = buffers


def _share(array: NDArray[Any]) -> ort.OrtValue:
    """The array's own memory as ONNX Runtime sees it; the array must outlive every step that uses the value."""
    return ort.OrtValue.ortvalue_from_numpy(array, "cpu")
