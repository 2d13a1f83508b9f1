"""The same comparison layer by layer: keys and values, and, where values between can be read, the worst of them."""

from collections.abc import Mapping, Sequence

import msgspec

from ...runtime.metrics import Thresholds
from .measure import StepReport, largest_by_layer
from .steps import Script, Step
from .subjects import Array, Tapped
from .taps import gap_of, read_pair


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One layer over all steps. keys, values: error of what it cached, None if there is no cache to compare.

    worst: its tensor with the largest error, and error, which has travelled there; single: the largest error of one
    operation on the same inputs. Empty and None where no values can be read.
    """

    layer: int
    keys: float | None = None
    values: float | None = None
    worst: str = ""
    error: float | None = None
    single: float | None = None


def by_layer(reports: Sequence[StepReport]) -> list[LayerReport]:
    """From the cache's contents alone."""
    found: dict[int, dict[str, float]] = {}
    for report in reports:
        for layer, errors in largest_by_layer(report.kv_errors).items():
            worst = found.setdefault(layer, {})
            for kind, error in errors.items():
                worst[kind] = max(error, worst.get(kind, 0.0))
    return [LayerReport(layer=n, keys=e.get("key"), values=e.get("value")) for n, e in sorted(found.items())]


def with_taps(
    reports: Sequence[LayerReport], a: Tapped, b: Tapped, script: Script, thresholds: Thresholds
) -> list[LayerReport]:
    """Add what lies between, each subject running the script by itself."""
    own: dict[int, tuple[float, str]] = {}
    single: dict[int, float] = {}
    past_a = past_b = _empty(a, script)
    for step in script.steps:
        pair = read_pair(a, b, step, past_a, past_b)
        for name, want in pair.want.items():
            layer = _layer(a, pair.members, name)
            gap = gap_of(step, want, pair.own[name], thresholds.kv_error)
            alone = gap_of(step, want, pair.local[name], thresholds.kv_error)
            if layer is None or gap is None or alone is None:
                continue
            own[layer] = max(own.get(layer, (0.0, "")), (gap.error, name))
            single[layer] = max(single.get(layer, 0.0), alone.error)
        past_a, past_b = (_states(subject, step, past) for subject, past in ((a, past_a), (b, past_b)))
    return [
        msgspec.structs.replace(
            report,
            worst=own[report.layer][1] if report.layer in own else "",
            error=own[report.layer][0] if report.layer in own else None,
            single=single.get(report.layer),
        )
        for report in reports
    ]


def _layer(a: Tapped, members: Mapping[str, Mapping[str, Array]], name: str) -> int | None:
    first = next(iter(members.get(name, {})), name)
    return a.network.values[first].layer if first in a.network.values else None


def _empty(subject: Tapped, script: Script) -> dict[str, Array]:
    subject.reset(script.rows, script.capacity)
    states = subject.step(script.steps[0]).states
    return {name: state * 0 for name, state in states.items()}


def _states(subject: Tapped, step: Step, past: Mapping[str, Array]) -> dict[str, Array]:
    subject.restore(past)
    return dict(subject.step(step).states)
