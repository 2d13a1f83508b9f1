"""TensorRT and TensorRT-RTX on one GPU: one plan, a context a profile, the KV cache updated in place.

A state tensor's past and present are bound to the same address; a prefill of some rows binds the address of the
first. Inputs go up in one copy, only the logits come back. A decode step is captured in a CUDA graph once a batch
size, when the same rows come twice in a row; each batch size has a context of its own, because a captured graph ends
when its context is changed. What a plan's profiles cannot take at once is computed in groups of rows.
"""

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from ... import BundleError, EngineError
from .. import contract
from ..manifest import Contract, Limits
from . import Float32, Int32, Int64, KvCache, check_step
from .cuda_memory import Device
from .device_cache import DeviceKvCache
from .step_buffers import Packing, StepBuffers, StepShape
from .trt_contract import input_names, state_layouts
from .trt_plan import Context, Plan, Profile

_log = logging.getLogger(__name__)


class _Decoder:
    """The context of one batch size's decode steps, its graph, and the addresses that both know."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.graph: Any = None
        self.addresses: tuple[int, ...] = ()


class TensorRtEngine:
    """See `Engine`. One stream, one set of buffers: hold `lock` around a step and the use of its logits.

    no_graphs: why decode steps are not captured in CUDA graphs, None while they are.
    """

    def __init__(
        self,
        trt: ModuleType,
        plan: Path,
        spec: Contract,
        limits: Limits,
        *,
        cubins: bytes | None = None,
        plugins: Sequence[str] = (),
        cuda: Any = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Open a plan on the first visible GPU.

        Args:
            trt: `plugins_trt.trt.load(…)`.
            plan: the serialised engine.
            spec: the contract from the manifest; types of the states come from the plan.
            limits: what to serve; narrowed to what the plan's profiles take.
            cubins: kernels of the plan's plugins, None if it has none.
            plugins: operators that are plugins in it.
            cuda: `cuda.bindings.driver`, or what stands in for it.
            cuda_graphs: capture decode steps.

        Raises:
            EngineError: no GPU, TensorRT cannot read the plan here, or the plan breaks the contract.
            DeviceMemoryError: it does not fit into the GPU's memory.
            BundleError: the kernel library is damaged.
        """
        self.lock = threading.Lock()
        self.no_graphs = None if cuda_graphs else "they were switched off"
        self._spec = spec
        self._contexts: dict[int, Context] = {}
        self._decoders: dict[int, _Decoder] = {}
        self._groups: dict[StepShape, list[tuple[Profile, int, int]]] = {}
        self._plan: Plan | None = None
        self._device = Device(cuda)
        try:
            with self._device.entered():
                self._plan = Plan(trt, plan, self._device, cubins, plugins)
                self._names = input_names(spec, self._plan)
                self._layouts = state_layouts(spec, self._plan)
                self._profiles = sorted(self._plan.profiles, key=lambda p: self._largest(p)[1])
                self.limits = self._narrow(limits)
                self._buffers = StepBuffers(self._device, self._names, self.limits)
        except BaseException:
            self.close()
            raise

    def allocate(self, rows: int) -> DeviceKvCache:
        """See `Engine`.

        Raises:
            DeviceMemoryError: it does not fit into the GPU's memory.
        """
        return DeviceKvCache(self._device, self._layouts, rows)

    def step(
        self,
        cache: KvCache,
        first_row: int,
        input_ids: Int64,
        seqlen_offsets: Int32,
        input_lens: Int32,
        logit_positions: Int64,
    ) -> Float32:
        """See `Engine`. The logits are gone with the engine: copy them before `close`.

        Raises:
            DeviceMemoryError: a context for a new batch size, or more logits than before, do not fit.
        """
        if self._plan is None:
            raise EngineError("the engine is closed")
        if not isinstance(cache, DeviceKvCache) or cache.device is not self._device:
            raise EngineError("the cache belongs to another engine")
        check_step(self.limits, cache.rows, first_row, input_ids, seqlen_offsets, input_lens, logit_positions)
        batch, length = input_ids.shape
        num_logits = logit_positions.shape[1]
        with self._device.entered():
            logits = self._buffers.logits(batch * num_logits)
            shape = (batch, length, num_logits)
            groups = self._groups.get(shape) or self._groups.setdefault(shape, self._split(shape))
            for profile, start, end in groups:
                rows = slice(start, end)
                packing = self._buffers.packing((end - start, length, num_logits))
                inputs = packing.inputs
                inputs[contract.INPUT_IDS][...] = input_ids[rows]
                inputs[contract.SEQLEN_OFFSETS][...] = seqlen_offsets[rows]
                inputs[contract.INPUT_LENS][...] = input_lens[rows]
                inputs[contract.LOGIT_POSITIONS][...] = logit_positions[rows]
                np.add(seqlen_offsets[rows, None], packing.steps, out=inputs[contract.START_OFFSETS_KERNEL])
                part = logits[start * num_logits : end * num_logits]
                run = self._decode if length == 1 else self._prefill
                run(profile, packing, cache.addresses(first_row + start), part)
                self._device.synchronize()
        return logits.reshape(batch, num_logits, -1)

    def close(self) -> None:
        """See `Engine`. Caches and logits of this engine lose their memory, too; a failing GPU is only logged."""
        plan, self._plan = self._plan, None
        graphs = [decoder.graph for decoder in self._decoders.values() if decoder.graph is not None]
        try:
            with self._device.entered():
                self._release(self._device.synchronize)
                for graph in graphs:
                    self._release(functools.partial(self._device.destroy_graph, graph))
                self._decoders.clear()
                self._contexts.clear()
                if plan is not None:
                    self._release(plan.close)
        except EngineError as error:
            _log.debug("closing an engine whose GPU is gone or closed: %s", error)
        self._device.close()

    def _release(self, release: Callable[[], None]) -> None:
        try:
            release()
        except EngineError as error:
            _log.warning("while closing: %s", error)

    def _prefill(self, profile: Profile, packing: Packing, states: tuple[int, ...], logits: Float32) -> None:
        context = self._contexts.get(profile.index)
        if context is None:
            context = self._contexts[profile.index] = self._open_context(profile, repeated=False)
        self._bind(context, packing, states)
        self._enqueue(context, packing, logits)

    def _decode(self, profile: Profile, packing: Packing, states: tuple[int, ...], logits: Float32) -> None:
        """Replay the batch size's graph; record it when the same addresses come a second time in a row."""
        decoder = self._decoders.get(packing.batch)
        if decoder is None:
            decoder = self._decoders[packing.batch] = _Decoder(self._open_context(profile, repeated=True))
        addresses = (*states, self._buffers.logits_address, logits.ctypes.data)
        repeated = decoder.addresses == addresses
        if not repeated:
            self._drop_graph(decoder)
            decoder.addresses = ()
            self._bind(decoder.context, packing, states)
        if repeated and decoder.graph is None and self.no_graphs is None:
            self._capture(decoder, packing, logits)
        if decoder.graph is not None:
            self._device.launch_graph(decoder.graph)
        else:
            self._enqueue(decoder.context, packing, logits)
            decoder.addresses = addresses

    def _enqueue(self, context: Context, packing: Packing, logits: Float32) -> None:
        """Inputs up, one execution, logits down, in stream order."""
        self._buffers.upload(packing)
        context.enqueue()
        self._buffers.download(logits)

    def _capture(self, decoder: _Decoder, packing: Packing, logits: Float32) -> None:
        """Record a step whose shapes TensorRT has executed before; if that fails it is not tried again."""
        reason = decoder.context.uncapturable()
        if reason is None:
            try:
                decoder.graph = self._device.capture(lambda: self._enqueue(decoder.context, packing, logits))
            except EngineError as error:
                reason = str(error)
        if reason is not None:
            self.no_graphs = reason
            _log.warning("decode steps run without a CUDA graph: %s", reason)

    def _drop_graph(self, decoder: _Decoder) -> None:
        if decoder.graph is not None:
            graph, decoder.graph = decoder.graph, None
            self._device.destroy_graph(graph)

    def _open_context(self, profile: Profile, *, repeated: bool) -> Context:
        assert self._plan is not None
        return self._plan.context(profile, repeated=repeated)

    def _bind(self, context: Context, packing: Packing, states: tuple[int, ...]) -> None:
        """The step's inputs, the logits, and every state as past and present at one address."""
        shapes = {self._names[role]: shape for role, shape in packing.shapes.items()}
        addresses = {self._names[role]: address for role, address in packing.addresses.items()}
        addresses[self._spec.logits.name] = self._buffers.logits_address
        for layout, address in zip(self._layouts, states, strict=True):
            shapes[layout.input] = (packing.batch, layout.heads, layout.positions, layout.dim)
            addresses[layout.input] = addresses[layout.output] = address
        context.bind(shapes, addresses)

    def _split(self, shape: StepShape) -> list[tuple[Profile, int, int]]:
        """Neighbouring rows that one profile takes at once: (profile, start, end)."""
        batch, length, num_logits = shape
        groups: list[tuple[Profile, int, int]] = []
        start = 0
        while start < batch:
            sizes = ((size, self._fitting((size, length, num_logits))) for size in range(batch - start, 0, -1))
            size, profile = next(((size, found) for size, found in sizes if found is not None), (0, None))
            if profile is None:
                known = ", ".join(str(p.ranges[self._names[contract.INPUT_IDS]]) for p in self._profiles)
                raise EngineError(
                    f"no profile of the plan takes {length} tokens with {num_logits} logits a row; input_ids: {known}"
                )
            groups.append((profile, start, start + size))
            start += size
        return groups

    def _fitting(self, shape: StepShape) -> Profile | None:
        shapes = {self._names[role]: extent for role, extent in self._buffers.packing(shape).shapes.items()}
        return next((profile for profile in self._profiles if profile.takes(shapes)), None)

    def _largest(self, profile: Profile) -> tuple[int, int]:
        """Rows and new tokens a row."""
        batch, length = profile.ranges[self._names[contract.INPUT_IDS]][1]
        return batch, length

    def _narrow(self, limits: Limits) -> Limits:
        sizes = [self._largest(profile) for profile in self._profiles]
        max_batch, max_chunk = max(batch for batch, _ in sizes), max(length for _, length in sizes)
        narrowed = msgspec.structs.replace(
            limits, max_batch=min(limits.max_batch, max_batch), max_chunk=min(limits.max_chunk, max_chunk)
        )
        positions = min(layout.positions for layout in self._layouts)
        if limits.capacity + narrowed.max_chunk > positions:
            raise BundleError(
                f"the plan's cache has {positions} positions, {limits.capacity} tokens and a chunk of "
                f"{narrowed.max_chunk} need {limits.capacity + narrowed.max_chunk}: build it again"
            )
        return narrowed
