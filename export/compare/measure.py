"""How far two subjects are apart after a step, and two tensors at the tokens that count.

Built on `runtime.metrics`; nothing here knows what the tensors are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from ...runtime.metrics import Thresholds, Verdict, deviations, relative_error, verdicts
from .steps import Step
from .subjects import Array, Output


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Two subjects after one step; the worst token counts.

    cosine … top10_overlap: see `metrics.Deviations`. kv_errors: of the keys and values, by the contract's name of the
    buffer, the worst row. allowed: what the error of keys and values may be.
    """

    step: int
    title: str
    tokens: int
    cosine: float
    norm_ratio: float
    relative_error: float
    max_error: float
    mean_error: float
    top1_agreement: float
    near_ties: int
    top10_overlap: float
    kv_errors: dict[str, float]
    allowed: float
    verdict: Verdict

    def __bool__(self) -> bool:
        """Whether the two agree; Polygraphy asks."""
        return self.verdict is not Verdict.FAIL

    @property
    def kv_error(self) -> float | None:
        """The worst of `kv_errors`."""
        return max(self.kv_errors.values(), default=None)


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of a tensor's elements at the tokens that count."""

    mean: float
    std: float
    min: float
    max: float
    norm: float

    @classmethod
    def of(cls, values: Array) -> "Statistics":
        """Measure; of nothing all are 0."""
        wide = values.astype(np.float64)
        if not wide.size:
            return cls(mean=0.0, std=0.0, min=0.0, max=0.0, norm=0.0)
        return cls(
            mean=float(wide.mean()),
            std=float(wide.std()),
            min=float(wide.min()),
            max=float(wide.max()),
            norm=float(np.linalg.norm(wide)),
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """error: of the worst token (of a state: the worst row). row, token: the first that is beyond `bound`, or the
    worst."""

    error: float
    row: int
    token: int


def compare_step(
    number: int, step: Step, want: Output, got: Output, thresholds: Thresholds, scale: float
) -> StepReport:
    """Compare what two subjects gave.

    Args:
        number: of the step.
        step: that both ran.
        want: of the reference.
        got: of the other.
        thresholds: what they may differ by.
        scale: max |want| so far, of which the largest error is a share; raised by this step's own.
    """
    valid = step.valid(step.logit_positions.shape[1])
    reference = want.logits[valid]
    found = deviations(reference, got.logits[valid])
    scale = max(scale, float(np.abs(reference).max(initial=0.0)))
    judged = verdicts(found, thresholds, scale)
    errors = {
        name: state_gap(step, want.states[name], got.states[name], thresholds.kv_error).error
        for name in want.states
        if name in got.states
    }
    within = (
        bool(np.all(found.max_error <= thresholds.max_error * scale))
        and bool(np.all(found.relative_error <= thresholds.relative_error))
        and bool(np.all(np.abs(found.norm_ratio - 1) <= thresholds.norm_ratio))
        and all(error <= thresholds.kv_error for error in errors.values())
    )
    ties = sum(verdict is Verdict.AMBIGUOUS for verdict in judged)
    verdict = Verdict.AMBIGUOUS if ties else Verdict.PASS
    if not within or Verdict.FAIL in judged:
        verdict = Verdict.FAIL
    farthest = int(np.abs(found.norm_ratio - 1).argmax())
    return StepReport(
        step=number,
        title=step.title,
        tokens=len(found),
        cosine=float(found.cosine.min()),
        norm_ratio=float(found.norm_ratio[farthest]),
        relative_error=float(found.relative_error.max()),
        max_error=float(found.max_error.max()),
        mean_error=float(found.mean_error.mean()),
        top1_agreement=float(found.agrees.mean()),
        near_ties=ties,
        top10_overlap=float(found.overlap.mean()),
        kv_errors=errors,
        allowed=thresholds.kv_error,
        verdict=verdict,
    )


def token_gap(step: Step, want: Array, got: Array, bound: float) -> Gap:
    """Compare (B, S or K, …) token by token, those that count."""
    valid = step.valid(want.shape[1])
    places = np.argwhere(valid)
    w, g = want[valid].astype(np.float64), got[valid].astype(np.float64)
    w, g = w.reshape(len(w), -1), g.reshape(len(g), -1)
    errors = _ratio(np.linalg.norm(g - w, axis=1), np.linalg.norm(w, axis=1))
    if not len(errors):
        return Gap(0.0, 0, 0)
    beyond = np.flatnonzero(~(errors <= bound))
    place = places[beyond[0] if len(beyond) else errors.argmax()]
    return Gap(float(np.max(errors)) if np.isfinite(errors).all() else float("inf"), int(place[0]), int(place[1]))


def state_gap(step: Step, want: Array, got: Array, bound: float) -> Gap:
    """Compare cache contents (B, Hkv, C, D) row by row, the tokens that are cached; token is the first one beyond."""
    worst, first = Gap(0.0, 0, 0), None
    for row, length in enumerate(step.lengths.tolist()):
        w, g = want[row, :, :length], got[row, :, :length]
        error = relative_error(w, g)
        error = error if np.isfinite(error) else float("inf")
        if error > worst.error:
            worst = Gap(error, row, _first_token(w, g, bound))
        if error > bound and first is None:
            first = Gap(error, row, _first_token(w, g, bound))
    return Gap(worst.error, first.row, first.token) if first is not None else worst


def valid_part(step: Step, value: Array) -> Array:
    """The elements that count, as one row: of a state (4 dimensions) what is cached, else of the valid tokens."""
    if value.ndim == 4:
        return np.concatenate([value[row, :, :n].ravel() for row, n in enumerate(step.lengths.tolist())])
    return np.asarray(value[step.valid(value.shape[1])].ravel())


def largest_by_layer(errors: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """Errors by the contract's names of buffers -> layer -> kind -> error."""
    layers: dict[int, dict[str, float]] = {}
    for name, error in errors.items():
        _, layer, kind = name.rsplit(".", 2)
        layers.setdefault(int(layer), {})[kind] = error
    return layers


def _first_token(want: Array, got: Array, bound: float) -> int:
    difference = np.linalg.norm((got.astype(np.float64) - want).transpose(1, 0, 2).reshape(want.shape[1], -1), axis=1)
    size = np.linalg.norm(want.astype(np.float64).transpose(1, 0, 2).reshape(want.shape[1], -1), axis=1)
    beyond = np.flatnonzero(~(_ratio(difference, size) <= bound))
    return int(beyond[0]) if len(beyond) else 0


def _ratio(part: Array, whole: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((part == 0) & (whole == 0), 0.0, part / whole)
