"""Bisecting one link of the chain: two subjects of which every value can be read.

Each value of the later subject is computed from the values of the earlier one, so an error does not travel: whatever
differs, differs by itself, and a link with several faults shows all of them at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.metrics import Thresholds
from . import hints
from .finding import Finding, Stage
from .measure import Gap, Statistics, state_gap, token_gap, valid_part
from .places import Names, place, region
from .steps import Step
from .subjects import Array, Tapped

_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_SUSPECT = 32 * _UNIT
"""One operation on the same inputs is a few units off (5 measured of 1536 summands); more may be a small fault."""
_UNUSUAL = 8
"""It is one if the same marker elsewhere is this many times closer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Values of two subjects in one step, by the later one's names.

    names: which of them both have. want: of the reference, in the later one's shapes. own: of the later one's own run.
    local: of the later one, computed from `want`. members: packed value -> the reference's values that it joins.
    """

    names: Names
    want: dict[str, Array]
    own: dict[str, Array]
    local: dict[str, Array]
    members: dict[str, dict[str, Array]]


def read_pair(a: Tapped, b: Tapped, step: Step, past_a: Mapping[str, Array], past_b: Mapping[str, Array]) -> Pair:
    """Run a step in both, each from its own past, and what both have of it in `b` from the values of `a`."""
    packs = _packs(a, b)
    common = [name for name in b.network.values if name in a.network.values and not name.startswith("val_")]
    b.restore(past_b)
    _, own = b.tap(step, [*common, *packs])
    own = {name: value for name, value in own.items() if np.issubdtype(value.dtype, np.floating)}
    a.restore(past_a)
    _, reference = a.tap(step, [*common, *dict.fromkeys(part for parts in packs.values() for part in parts)])
    want: dict[str, Array] = {}
    members: dict[str, dict[str, Array]] = {}
    for name, value in own.items():
        whole = reference.get(name)
        if name in packs:
            members[name] = {part: reference[part] for part in packs[name]}
            whole = np.concatenate(list(members[name].values()), -1)
        fitting = _fit(step, whole, value.shape) if whole is not None else None
        if fitting is not None:
            want[name] = fitting.astype(value.dtype, copy=False)
    members = {name: parts for name, parts in members.items() if name in want}
    names = Names(a.network, b.network, frozenset(want), {name: tuple(parts) for name, parts in members.items()})
    return Pair(names, want, own, b.local(step, want, past_a), members)


def bisect(
    a: Tapped, b: Tapped, step: Step, number: int, stage: Stage, pair: Pair, thresholds: Thresholds
) -> Finding | None:
    """The first place at which `b` differs from `a` by itself, None if none stands out.

    If no value is beyond the thresholds, it is the one that is least exact for its kind, or made with another setting.
    """
    bound = thresholds.kv_error
    found = {name: gap_of(step, pair.want[name], value, bound) for name, value in pair.local.items()}
    gaps = {name: gap for name, gap in found.items() if gap is not None}
    ordered = sorted(gaps, key=pair.names.order)
    flagged = [name for name in ordered if gaps[name].error > bound]
    flagged = flagged or _outliers(pair.names, ordered, gaps) or _set_otherwise(pair.names, ordered)
    if not flagged:
        return None
    places = [place(pair.names, name, flagged, gaps[name].error) for name in flagged]
    first, where = flagged[0], places[0]
    want, got = pair.want[first], pair.local[first]
    explanation = _explain(a, b, step, pair, first, bound)
    moved = explanation.startswith(hints.MOVED) and "Gather" in where.operator
    return Finding(
        stage=stage,
        between=(a.name, b.name),
        step=number,
        title=step.title,
        layer=None if moved else where.layer,
        module="" if moved else where.module,
        marker="logits" if moved else where.marker,
        operator=where.operator,
        tensor=where.tensor,
        error=gaps[first].error,
        allowed=min(bound, _SUSPECT) if gaps[first].error <= bound else bound,
        row=gaps[first].row,
        token=gaps[first].token,
        reference=Statistics.of(valid_part(step, want)),
        found=Statistics.of(valid_part(step, got)),
        explanation=explanation,
        also=tuple(places[1:]),
    )


def gap_of(step: Step, want: Array, got: Array, bound: float) -> Gap | None:
    """How far two values are apart; None if they are not in a shape of which it is known what counts."""
    lengths = (step.input_ids.shape[1], step.logit_positions.shape[1])
    if want.shape != got.shape or not want.ndim or want.shape[0] != len(step.input_lens):
        return None
    if want.ndim == 4:
        return state_gap(step, want, got, bound)
    return token_gap(step, want, got, bound) if want.ndim == 3 and want.shape[1] in lengths else None


def _outliers(names: Names, ordered: Sequence[str], gaps: Mapping[str, Gap]) -> list[str]:
    """The value whose error, though small, is furthest above what its marker has elsewhere."""
    errors: dict[str, list[float]] = {}
    for name in ordered:
        errors.setdefault(names.marker(name), []).append(gaps[name].error)
    usual = {marker: float(np.median(found)) + 2 * _UNIT for marker, found in errors.items()}
    scores = {n: gaps[n].error / usual[names.marker(n)] for n in ordered if gaps[n].error > _SUSPECT}
    best = max(scores, key=lambda name: scores[name], default=None)
    return [best] if best is not None and scores[best] > _UNUSUAL else []


def _set_otherwise(names: Names, ordered: Sequence[str]) -> list[str]:
    """The first value that is made with another setting, though it makes no difference here."""
    plain = (name for name in ordered if name not in names.members)
    for name in plain:
        if hints.of_settings(region(names, name), names.b.between([name], names.common)[0]):
            return [name]
    return []


def _explain(a: Tapped, b: Tapped, step: Step, pair: Pair, name: str, bound: float) -> str:
    want, got, names = pair.want[name], pair.local[name], pair.names
    theirs = names.b.between([name], names.common)[0]
    width = next((value.shape[3] for value in pair.want.values() if value.ndim == 4), 0)
    if name in pair.members:
        blocks = hints.of_blocks(step, pair.members[name], got, a.network, bound, width)
        return blocks or hints.of_weights(a, b, [], theirs)
    ours = region(names, name)
    known = {other: value for other, value in pair.want.items() if other != name}
    known |= {part: value for parts in pair.members.values() for part, value in parts.items()}

    def look() -> Iterable[str]:
        yield hints.of_settings(ours, theirs)
        if want.ndim == 4:
            yield hints.of_value(step, name, want, got, known, a.network, bound)
        yield hints.of_structure(names, name)
        yield hints.of_weights(a, b, ours, theirs)
        yield hints.of_value(step, name, want, got, known, a.network, bound)

    return next((words for words in look() if words), "")


def _packs(a: Tapped, b: Tapped) -> dict[str, tuple[str, ...]]:
    """Packed linear of `b` -> the linears of `a` that it joins: those that follow the first and read the same."""
    packs: dict[str, tuple[str, ...]] = {}
    latest: dict[str, str] = {}
    linears = [v for v in a.network.values.values() if v.marker == "Linear" and not v.name.startswith("val_")]
    for value in b.network.values.values():
        stem = value.weights[0].removesuffix(".packed") if value.weights else ""
        same = [linear for linear in linears if linear.weights[0] == stem]
        if value.marker == "Linear" and same and stem != value.weights[0]:
            packs.pop(latest.get(stem, ""), None)  # the product without its bias
            latest[stem] = value.name
            packs[value.name] = tuple(v.name for v in linears if v.sources == same[-1].sources)
    return packs


def _fit(step: Step, value: Array, shape: tuple[int, ...]) -> Array | None:
    """A value in the shape that the other subject has it in: all tokens, or those whose logits are asked for."""
    if value.shape == shape:
        return value
    batch, length = step.input_ids.shape
    wanted = step.logit_positions.shape[1]
    if value.ndim == 3 and value.shape[:2] == (batch, length) and shape == (batch, wanted, value.shape[2]):
        return np.take_along_axis(value, step.logit_positions[:, :, None], 1)
    return None
