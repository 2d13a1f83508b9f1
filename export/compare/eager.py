"""The eager model, straight from the checkpoint, one module's weights in memory at a time."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...models.architecture import CausalModel
from ...models.cache import Cache
from ..proof import stream_parameters
from .steps import Step
from .subjects import Array, Kind, Output, state_pairs

_KEPT = 2 << 30
"""Bytes of float32 parameters up to which a comparison keeps what it has read instead of reading it every step."""


def reader(module: CausalModel, load: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`load`, remembering the parameters of a small model: several subjects read each of them once a step."""
    size = sum(parameter.numel() for parameter in module.parameters()) * 4
    return functools.cache(load) if size <= _KEPT else load


class EagerSubject:
    """See `Modular`."""

    kind: Kind = "eager"

    def __init__(self, module: CausalModel, load: Callable[[str], Tensor], name: str = "the eager model") -> None:
        """Wrap.

        Args:
            module: on the meta device, its tables real.
            load: parameter name -> tensor.
            name: for messages.
        """
        self.name = name
        self.module = module
        self.load = load
        self._names = [present for _, present in state_pairs(module.kv_shapes)]
        self._cache = Cache.of([])

    def reset(self, rows: int, capacity: int) -> None:
        """See `Subject`."""
        self._cache = Cache.zeros(self.module.kv_shapes, rows, capacity)

    @torch.no_grad()
    def step(self, step: Step) -> Output:
        """See `Subject`."""
        parts = list(self.module.named_modules())
        handles = [handle for name, part in parts for handle in stream_parameters(name, part, self.load)]
        try:
            arrays = (torch.from_numpy(np.ascontiguousarray(array)) for array in step.feed.values())
            logits = self.module(*arrays, self._cache)
        finally:
            for handle in handles:
                handle.remove()
        states = {name: tensor.numpy() for name, tensor in zip(self._names, self._cache.tensors(), strict=True)}
        return Output(logits.float().numpy(), states)

    def tap_modules(self, step: Step) -> tuple[Output, dict[str, Array]]:
        """See `Modular`."""
        with ModuleTaps(self.module) as taps:
            output = self.step(step)
        return output, {name: value.float().numpy() for name, value in taps.found.items()}

    def close(self) -> None:
        """See `Subject`."""
        self._cache = Cache.of([])


class ModuleTaps:
    """While entered, keeps what each module of `root` returns, if that is a tensor or begins with one."""

    def __init__(self, root: nn.Module) -> None:
        self.found: dict[str, Tensor] = {}
        self._root = root

    def __enter__(self) -> "ModuleTaps":
        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, result: Any) -> None:
                first = result[0] if isinstance(result, tuple) and result else result
                if isinstance(first, Tensor) and name:
                    self.found[name] = first.detach()

            return hook

        self._handles = [part.register_forward_hook(keep(name)) for name, part in self._root.named_modules()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
