"""What is compared: anything that runs the steps of a script over KV rows of its own.

A subject gives logits and, if it has a cache, the cache's contents; one that can also say what lies between gives taps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...models.cache import KvShape
from ...runtime import contract
from .network import Network
from .steps import Script, Step

Array = NDArray[Any]
Kind = Literal["transformers", "eager", "program", "universal", "lowered", "engine"]


@dataclass(frozen=True, slots=True)
class Output:
    """logits: (B, K, V). states: the contract's name of a buffer -> (B, Hkv, C, D), {} if there is no cache."""

    logits: NDArray[np.float32]
    states: Mapping[str, Array] = field(default_factory=dict)


class Subject(Protocol):
    """Runs steps.

    name: in words, for messages. kind: its place in the chain from the definition to the engine.
    """

    name: str
    kind: Kind

    def reset(self, rows: int, capacity: int) -> None:
        """Begin again with empty KV rows of `capacity` positions."""

    def step(self, step: Step) -> Output:
        """Run the next step."""

    def close(self) -> None:
        """Release what is held."""


@runtime_checkable
class Tapped(Subject, Protocol):
    """A subject whose intermediate values can be read, and computed anew from another subject's values."""

    @property
    def network(self) -> Network:
        """Its values by name."""

    def restore(self, states: Mapping[str, Array]) -> None:
        """Take the cache's contents from an earlier output of any subject."""

    def tap(self, step: Step, names: Iterable[str]) -> tuple[Output, dict[str, Array]]:
        """Run the next step; return also the named values."""

    def local(self, step: Step, given: Mapping[str, Array], past: Mapping[str, Array]) -> dict[str, Array]:
        """What the subject computes of each value in `given` if all others are as given.

        Args:
            step: whose inputs count.
            given: values of another subject, by name, in the shapes that they have here.
            past: the cache's contents before the step, by the names of the outputs.
        """

    def weight(self, name: str) -> Array | None:
        """A parameter or table, None if it has none of that name."""


@runtime_checkable
class Modular(Subject, Protocol):
    """A subject that can say what its modules return."""

    def tap_modules(self, step: Step) -> tuple[Output, dict[str, Array]]:
        """Run the next step; return also the outputs of modules by path, in the order in which they ran."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The outputs of a subject, one a step; error: why it stopped before the end."""

    subject: Subject
    outputs: tuple[Output, ...]
    error: str = ""


def trace(subject: Subject, script: Script) -> Trace:
    """Run a whole script; whatever a subject raises ends its trace and is kept as words."""
    outputs: list[Output] = []
    try:
        subject.reset(script.rows, script.capacity)
        for step in script.steps:
            outputs.append(subject.step(step))
    except Exception as error:  # a subject under suspicion may fail in any way, and that is a finding
        return Trace(subject, tuple(outputs), str(error) or type(error).__name__)
    return Trace(subject, tuple(outputs))


def state_pairs(shapes: Sequence[KvShape]) -> list[tuple[str, str]]:
    """(name in, name out) of every buffer, in the contract's order."""
    return [contract.state_names(layer, kind) for layer in range(len(shapes)) for kind in ("key", "value")]
