"""Zonda as Polygraphy runners, and a comparison function on Zonda's metrics, for Polygraphy's `Comparator`.

A runner takes the contract's five token inputs, one feed a step, and keeps the KV cache inside; activating it empties
the cache. Feeds for a whole comparison come from `feeds`.

    from polygraphy.comparator import Comparator
    runners = [EagerRunner(checkpoint), EngineRunner(bundle)]
    results = Comparator.run(runners, data_loader=feeds(prompts, limits))
    assert Comparator.compare_accuracy(results, compare_func=CompareSteps("float32"))
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from ...runtime import contract
from ...runtime.manifest import Limits
from ...runtime.metrics import THRESHOLDS, Thresholds
from .measure import StepReport, compare_step
from .specs import Source, Spec
from .steps import Script, Step, make_script
from .subjects import Array, Output, Subject

CAPACITY = 512
"""Positions of a runner's KV rows, if it is not told otherwise."""


class SubjectRunner(BaseRunner):  # type: ignore[misc]
    """Any subject of a comparison as a runner.

    Inputs: `input_ids` (B, S) int64, `seqlen_offsets` (B,) int32, `start_offsets_kernel` (B, S) int64, `input_lens`
    (B,) int32, `logit_positions` (B, K) int64. Outputs: `logits` (B, K, V) and, on request, each `present.{i}.key` and
    `.value` (B, Hkv, C, D). B is the same in all feeds. Logits of padding and what lies beyond the cached tokens are 0,
    because engines differ there and it means nothing.
    """

    def __init__(
        self, open_subject: Callable[[], Subject], name: str, *, capacity: int = CAPACITY, states: bool = False
    ) -> None:
        """Wrap; nothing is opened before the runner is activated.

        Args:
            open_subject: opens it.
            name: of the runner.
            capacity: positions of a KV row.
            states: whether the cache's contents are outputs too.
        """
        super().__init__(name=name)
        self._open_subject = open_subject
        self._capacity = capacity
        self._wants_states = states
        self._subject: Subject | None = None
        self._rows = 0

    def activate_impl(self) -> None:
        """Open the subject; its errors pass."""
        self._subject, self._rows = self._open_subject(), 0

    def get_input_metadata_impl(self) -> Any:
        """The contract's token inputs."""
        metadata = TensorMetadata()
        for role, (dtype, shape) in contract.INPUTS.items():
            metadata.add(role, np.dtype(dtype), [None] * len(shape))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> "OrderedDict[str, Array]":
        """Run one step."""
        assert self._subject is not None
        step = Step.of_feed(dict(feed_dict))
        if not self._rows:
            self._rows = len(step.input_lens)
            self._subject.reset(self._rows, self._capacity)
        started = time.perf_counter()
        output = self._subject.step(step)
        self.inference_time = time.perf_counter() - started
        logits = np.where(step.valid(output.logits.shape[1])[:, :, None], output.logits, np.float32(0))
        states = {name: _cached(step, state) for name, state in output.states.items()} if self._wants_states else {}
        return OrderedDict({contract.LOGITS: logits, **states})

    def deactivate_impl(self) -> None:
        """Release what the subject holds."""
        if self._subject is not None:
            self._subject.close()
        self._subject = None


class EagerRunner(SubjectRunner):
    """The eager torch model, straight from a checkpoint, one module's weights in memory at a time."""

    def __init__(self, checkpoint: str | Path, *, capacity: int = CAPACITY, states: bool = False) -> None:
        """Wrap a folder, a .gguf file or a hub id; activating raises `CheckpointError` if it cannot be read."""
        source = Source(Spec(f"torch:{checkpoint}", "eager", str(checkpoint)))
        super().__init__(lambda: source.subject("eager"), f"torch:{checkpoint}", capacity=capacity, states=states)


class OnnxRunner(SubjectRunner):
    """A bundle's universal or lowered graph on plain ONNX Runtime, without Zonda's runtime."""

    def __init__(
        self,
        bundle: str | Path,
        graph: Literal["universal", "lowered"] = "universal",
        *,
        capacity: int = CAPACITY,
        states: bool = False,
    ) -> None:
        """Wrap; activating raises `BundleError` if the bundle is not sound."""
        source = Source(Spec(f"{graph}:{bundle}", graph, str(bundle)))
        super().__init__(lambda: source.subject(graph), f"{graph}:{bundle}", capacity=capacity, states=states)


class EngineRunner(SubjectRunner):
    """A bundle's target as it serves."""

    def __init__(
        self, bundle: str | Path, target: str | None = None, *, capacity: int = CAPACITY, states: bool = False
    ) -> None:
        """Wrap the target, or the best that runs here; activating raises `BundleError`, `TargetUnavailableError`."""
        text = f"{bundle}:{target}" if target else str(bundle)
        source = Source(Spec(text, "engine", str(bundle), target))
        super().__init__(lambda: source.subject("engine"), text, capacity=capacity, states=states)


class CompareSteps:
    """A `compare_func`: Zonda's metrics and thresholds, step after step.

    reports: one a step, in order. The result of an iteration is `{"step": StepReport}`, true unless it failed.
    """

    def __init__(self, thresholds: str | Thresholds = "float32", steps: Sequence[Step] | None = None) -> None:
        """Wrap.

        Args:
            thresholds: or the name of their class.
            steps: that were fed, to know which tokens count; without them all do.
        """
        self.thresholds = THRESHOLDS[thresholds] if isinstance(thresholds, str) else thresholds
        self.reports: list[StepReport] = []
        self._steps = steps
        self._scale = 0.0

    def __call__(self, want: Mapping[str, Any], got: Mapping[str, Any]) -> "OrderedDict[str, StepReport]":
        """Compare one iteration of two runners."""
        number = len(self.reports)
        reference, found = _output(want), _output(got)
        step = self._steps[number] if self._steps is not None else _whole(reference)
        valid = step.valid(reference.logits.shape[1])
        self._scale = max(self._scale, float(np.abs(reference.logits[valid]).max(initial=0.0)))
        report = compare_step(number, step, reference, found, self.thresholds, self._scale)
        self.reports.append(report)
        return OrderedDict(step=report)


def feeds(prompts: Sequence[Sequence[int]], limits: Limits) -> list["OrderedDict[str, Array]"]:
    """The steps of `zonda compare` as feeds: a ragged prefill, continuations, a last-token chunk, decode steps.

    Args:
        prompts: token ids of up to three rows.
        limits: of the bundle.
    """
    return feeds_of(make_script(prompts, limits))


def feeds_of(script: Script) -> list["OrderedDict[str, Array]"]:
    """A script as feeds."""
    return [OrderedDict(step.feed) for step in script.steps]


def _output(result: Mapping[str, Any]) -> Output:
    arrays = {name: np.asarray(value) for name, value in result.items()}
    return Output(arrays.pop(contract.LOGITS), arrays)


def _cached(step: Step, state: Array) -> Array:
    """A buffer (B, Hkv, C, D) with nothing beyond the cached tokens of each row."""
    kept = np.arange(state.shape[2])[None] < step.lengths[:, None]
    return np.where(kept[:, None, :, None], state, state.dtype.type(0))


def _whole(output: Output) -> Step:
    """A step in which every token counts."""
    batch, wanted = output.logits.shape[:2]
    positions = np.arange(wanted)[None].repeat(batch, 0)
    cached = max((state.shape[2] for state in output.states.values()), default=wanted)
    lens, offsets = np.full(batch, wanted, np.int32), np.full(batch, cached - wanted, np.int32)
    return Step("", np.zeros((batch, wanted), np.int64), offsets, lens, positions, positions)
