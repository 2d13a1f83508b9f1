"""A bundle's target as it serves: the real engine, with its bindings, its in-place cache and its guards."""

from collections.abc import Callable

import numpy as np

from ...runtime.engines import Engine, KvCache
from ...runtime.manifest import Contract
from .steps import Step
from .subjects import Kind, Output


class EngineSubject:
    """See `Subject`."""

    kind: Kind = "engine"

    def __init__(self, open_engine: Callable[[], Engine], spec: Contract, name: str = "the engine") -> None:
        """Wrap; the engine is opened when it is first needed.

        Args:
            open_engine: opens it; its errors pass.
            spec: the contract, for the names of the states.
            name: for messages.
        """
        self.name = name
        self._open = open_engine
        self._engine: Engine | None = None
        self._names = [state.output for state in spec.states]
        self._cache: KvCache | None = None
        self._rows = self._length = 0

    def reset(self, rows: int, capacity: int) -> None:
        """See `Subject`."""
        if self._engine is None:
            self._engine = self._open()
        self._cache = self._engine.allocate(rows)
        self._rows, self._length = rows, min(capacity, self._engine.limits.capacity)

    def step(self, step: Step) -> Output:
        """See `Subject`."""
        assert self._engine is not None
        assert self._cache is not None
        with self._engine.lock:
            logits = self._engine.step(
                self._cache, 0, step.input_ids, step.seqlen_offsets, step.input_lens, step.logit_positions
            ).copy()
        rows = [self._cache.read(row, self._length) for row in range(self._rows)]
        states = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(self._names)}
        return Output(logits, states)

    def close(self) -> None:
        """See `Subject`."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._cache = None
