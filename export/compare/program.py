"""The traced program, run node by node, with parameters read from the checkpoint when a node needs them.

Its values bear the universal graph's names, so it is what that graph is held to.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import map_arg

from ...models.architecture import CausalModel
from ...models.cache import Cache
from ...models.loading import with_floats
from ...runtime import contract
from ..universal import trace
from .network import Network, of_program, program_names
from .steps import Step
from .subjects import Array, Kind, Output, state_pairs


class ProgramSubject:
    """See `Tapped`."""

    kind: Kind = "program"

    def __init__(self, module: CausalModel, load: Callable[[str], Tensor], name: str = "the traced program") -> None:
        """Wrap; the module is traced when it is first needed.

        Args:
            module: on the meta device, its tables real.
            load: parameter name -> tensor; tables are taken from the module.
            name: for messages.
        """
        self.name = name
        self._module = module
        self._parameter = load
        self._tables = {n: t for n, t in module.named_buffers(remove_duplicate=False) if not t.is_meta}
        self._pairs = state_pairs(module.kv_shapes)
        self._states: dict[str, Tensor] = {}

    @cached_property
    def _program(self) -> torch.export.ExportedProgram:
        return trace(self._module)

    @cached_property
    def _names(self) -> dict[str, str]:
        return program_names(self._program, *self._interface)

    @cached_property
    def _interface(self) -> tuple[list[str], list[str]]:
        inputs = [*contract.INPUTS, *(past for past, _ in self._pairs)]
        return inputs, [contract.LOGITS, *(present for _, present in self._pairs)]

    @cached_property
    def network(self) -> Network:
        """See `Tapped`."""
        return of_program(self._program, *self._interface)

    def reset(self, rows: int, capacity: int) -> None:
        """See `Subject`."""
        cache = Cache.zeros(self._module.kv_shapes, rows, capacity)
        self._states = dict(zip((present for _, present in self._pairs), cache.tensors(), strict=True))

    def restore(self, states: Mapping[str, Array]) -> None:
        """See `Tapped`."""
        self._states = {name: torch.from_numpy(state) for name, state in states.items()}

    def step(self, step: Step) -> Output:
        """See `Subject`."""
        return self.tap(step, ())[0]

    def tap(self, step: Step, names: Iterable[str]) -> tuple[Output, dict[str, Array]]:
        """See `Tapped`."""
        outputs = {contract.LOGITS, *self._states}
        values = self._run(step, self._states, {}, {*names} | outputs)
        self._states = {name: values[name] for name in self._states}
        found = {name: values[name].numpy() for name in names if isinstance(values.get(name), Tensor)}
        states = {name: state.numpy() for name, state in self._states.items()}
        return Output(values[contract.LOGITS].float().numpy(), states), found

    def local(self, step: Step, given: Mapping[str, Array], past: Mapping[str, Array]) -> dict[str, Array]:
        """See `Tapped`."""
        before = {name: torch.from_numpy(state) for name, state in past.items()}
        values = self._run(step, before, {name: torch.from_numpy(v) for name, v in given.items()}, set(given))
        return {name: value.numpy() for name, value in values.items()}

    def weight(self, name: str) -> Array | None:
        """See `Tapped`."""
        try:
            return np.asarray(self._load(name).float().numpy())
        except KeyError:
            return None

    def _load(self, name: str) -> Tensor:
        return self._tables[name] if name in self._tables else self._parameter(name)

    def close(self) -> None:
        """See `Subject`."""
        self._states = {}

    @torch.no_grad()
    def _run(
        self, step: Step, states: Mapping[str, Tensor], given: Mapping[str, Tensor], wanted: set[str]
    ) -> dict[str, Any]:
        """The wanted values; where a value is given, its readers read that one."""
        nodes = list(self._program.graph.nodes)
        last_reader = {parent: node for node in nodes for parent in node.all_input_nodes}
        feed: dict[str, Any] = {role: torch.from_numpy(np.ascontiguousarray(a)) for role, a in step.feed.items()}
        feed |= {past: states[present] for past, present in self._pairs}
        signature = self._program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values: dict[torch.fx.Node, Any] = {}
        found: dict[str, Any] = {}

        def read(node: torch.fx.Node) -> Any:
            if node.name in stored:
                return with_floats(self._load(stored[node.name].removeprefix("inner.")))
            return values[node]

        for node in nodes:
            name = self._names[node.name]
            if node.op == "placeholder":
                if node.name not in stored:
                    values[node] = feed[name]
                continue
            if node.op != "call_function":
                continue
            arguments = map_arg(node.args, read)
            options = {key: _on_cpu(value) for key, value in map_arg(node.kwargs, read).items()}
            value = node.target(*arguments, **options)
            if name in wanted:
                found[name] = value
            values[node] = given.get(name, value)
            for parent in node.all_input_nodes:
                if last_reader[parent] is node:
                    values.pop(parent, None)
        return found


def _on_cpu(value: Any) -> Any:
    """The program was traced on the meta device; what it allocates is wanted here."""
    return torch.device("cpu") if isinstance(value, torch.device) else value
