"""transformers, as another implementation of the same architecture: its own reader, its own definition.

Every step computes each row anew from its first token, so nothing depends on how transformers keeps a cache; the keys
and values are those that it would keep.
"""

from typing import Any

import numpy as np
import torch

from ...runtime import contract
from ..transformers_reference import load_transformers
from .eager import ModuleTaps
from .steps import Step
from .subjects import Array, Kind, Output


class TransformersSubject:
    """See `Modular`."""

    kind: Kind = "transformers"

    def __init__(self, checkpoint: str, revision: str | None = None) -> None:
        """Load the whole model in float32.

        Args:
            checkpoint: as of `load_transformers`.
            revision: the commit of a hub id.

        Raises:
            BuildError: as of `load_transformers`.
        """
        self.name = f"transformers with {checkpoint}"
        self._model = load_transformers(checkpoint, revision)
        self._rows: list[list[int]] = []
        self._capacity = 0

    def reset(self, rows: int, capacity: int) -> None:
        """See `Subject`."""
        self._rows, self._capacity = [[] for _ in range(rows)], capacity

    def step(self, step: Step) -> Output:
        """See `Subject`."""
        return self._run(step, {})

    def tap_modules(self, step: Step) -> tuple[Output, dict[str, Array]]:
        """See `Modular`."""
        taps: dict[str, Array] = {}
        return self._run(step, taps), taps

    def close(self) -> None:
        """See `Subject`."""
        self._model = None

    @torch.no_grad()
    def _run(self, step: Step, taps: dict[str, Array]) -> Output:
        batch, length = step.input_ids.shape
        everywhere: dict[str, Array] = {}
        states: dict[str, Array] = {}
        for row, tokens in enumerate(self._rows):
            offset, new = int(step.seqlen_offsets[row]), int(step.input_lens[row])
            tokens[offset:] = step.input_ids[row, :new].tolist()
            if not tokens:
                continue
            with ModuleTaps(self._model) as found:
                result = self._model(torch.tensor([tokens]), use_cache=True)
            values = found.found | {"": result.logits}
            for name, value in values.items():
                if value.ndim == 3 and value.shape[:2] == (1, len(tokens)):
                    whole = everywhere.setdefault(name, np.zeros((batch, length, value.shape[2]), np.float32))
                    whole[row, :new] = value[0, offset:].float().numpy()
            for name, state in _states(result.past_key_values):
                shape = (batch, state.shape[1], self._capacity, state.shape[3])
                whole = states.setdefault(name, np.zeros(shape, np.float32))
                whole[row, :, : state.shape[2]] = state[0].float().numpy()
        logits = np.take_along_axis(everywhere.pop(""), step.logit_positions[:, :, None], 1)
        taps.update(everywhere)
        return Output(logits, states)


def _states(cache: Any) -> list[tuple[str, Any]]:
    """(the contract's name, (1, Hkv, T, D)) of each layer's keys and values."""
    found = []
    for index, layer in enumerate(cache.layers):
        for kind, state in (("key", layer.keys), ("value", layer.values)):
            found.append((contract.state_names(index, kind)[1], state))
    return found
