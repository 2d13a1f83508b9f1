"""Simple explanations of a tensor that is not what it should be: it is another one, moved, scaled, or made of others.

Each function looks at arrays or names and gives words, or "" if it explains nothing.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from ...runtime import contract
from .measure import state_gap, token_gap
from .network import Network, Value
from .places import Names, bypassed, lost
from .steps import Step
from .subjects import Array, Tapped

MOVED = "it is taken at another position"


def of_structure(names: Names, name: str) -> str:
    """It is not made of what the reference makes it of."""
    gone = sorted(lost(names, name))
    add = bypassed(names, name)
    if add is not None:
        return f"the residual add is bypassed: {name} is made without {' and '.join(gone)}"
    return f"it is not made of {' and '.join(gone)}, as the reference is" if gone else ""


def of_settings(want: Iterable[Value], got: Iterable[Value]) -> str:
    """A number of the operation is another."""
    reference = {name: number for value in want for name, number in value.settings.items()}
    found = {name: number for value in got for name, number in value.settings.items()}
    words = [
        f"{name} is {found[name]:.6g} instead of {number:.6g}"
        for name, number in reference.items()
        if name in found and not np.isclose(np.float32(found[name]), np.float32(number), rtol=1e-6, atol=0)
    ]
    return ", ".join(words)


def of_weights(a: Tapped, b: Tapped, want: Iterable[Value], got: Iterable[Value]) -> str:
    """A weight that it reads holds other values, or it reads another weight."""
    reference = dict.fromkeys(name for value in want for name in value.weights)
    read = dict.fromkeys(name for value in got for name in value.weights if not name.startswith("val_"))
    for name in read:
        theirs, ours = a.weight(name), b.weight(name)
        if theirs is None or ours is None:
            continue
        if theirs.shape != ours.shape:
            return f"its {name} is {list(ours.shape)} instead of {list(theirs.shape)}"
        if not np.array_equal(theirs, ours, equal_nan=True):
            different = theirs != ours
            first = [int(i) for i in np.argwhere(different)[0]]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = ours[different] / theirs[different]
            times = f", {ratios.mean():.4g} times as large" if np.ptp(ratios) < 1e-4 * abs(ratios.mean()) else ""
            return f"its {name} differs in {int(different.sum()):,} of {theirs.size:,} values, first at {first}{times}"
    others = [name for name in read if name not in reference and a.weight(name) is None and ".packed" not in name]
    left = [name for name in reference if name not in read]
    return f"it reads {others[0]} instead of {left[0]}" if others and left and len(reference) == len(read) else ""


def of_value(
    step: Step, name: str, want: Array, got: Array, known: Mapping[str, Array], network: Network | None, bound: float
) -> str:
    """It is another tensor of the reference, or its own moved or scaled.

    Args:
        step: that was run.
        name: of the tensor.
        want, got: what it should be and what it is.
        known: other tensors of the reference, by name.
        network: of the reference, to say where they lie.
        bound: error below which two are the same.
    """
    if want.ndim == 4:
        return _of_state(step, name, want, got, known, network, bound)
    for other, value in known.items():
        if other != name and value.shape == got.shape and token_gap(step, value, got, bound).error <= bound:
            return f"it is what {_where(other, network)} is in the reference"
    return _of_tokens(step, want, got, bound) or _of_scale(step, want, got, bound)


def of_blocks(
    step: Step, members: Mapping[str, Array], got: Array, network: Network | None, bound: float, width: int
) -> str:
    """Of a packed tensor: which members' columns differ, and whether they hold another's, or heads in another order.

    Args:
        step: that was run.
        members: what it should join, by name.
        got: what it is.
        network: of the reference.
        bound: error below which two are the same.
        width: columns of a head.
    """
    start, words = 0, []
    for name, want in members.items():
        part = got[..., start : start + want.shape[-1]]
        start += want.shape[-1]
        if token_gap(step, want, part, bound).error <= bound:
            continue
        same = [
            n for n, v in members.items() if v.shape == part.shape and token_gap(step, v, part, bound).error <= bound
        ]
        if same:
            words.append(f"where {_where(name, network)} belongs is {_where(same[0], network)}")
        elif width and _reordered(step, want, part, width, bound):
            words.append(f"the heads of {_where(name, network)} are in another order")
        else:
            words.append(f"the part of {_where(name, network)} differs")
    return ", ".join(words)


def _reordered(step: Step, want: Array, got: Array, width: int, bound: float) -> bool:
    """Whether each head of `got` is one of `want`, a different one each."""
    count = want.shape[-1] // width
    heads = [slice(head * width, (head + 1) * width) for head in range(count)]
    found = [
        next((i for i, s in enumerate(heads) if token_gap(step, want[..., s], got[..., h], bound).error <= bound), -1)
        for h in heads
    ]
    return sorted(found) == list(range(count)) and found != sorted(found)


def _of_state(
    step: Step, name: str, want: Array, got: Array, known: Mapping[str, Array], network: Network | None, bound: float
) -> str:
    """Keys or values of another buffer, at other positions, of another tensor, or not written at all."""
    label = _label(name)
    for other, value in known.items():
        if other != name and value.shape == want.shape and state_gap(step, value, got, bound).error <= bound:
            return f"{label} are written elsewhere: here are {_label(other)}"
    rows = [row for row, new in enumerate(step.input_lens.tolist()) if new]
    for shift in (1, -1):
        if all(_same(_new(step, row, want), _new(step, row, got, shift), bound) for row in rows):
            return f"{label} of new tokens lie one position {'later' if shift > 0 else 'earlier'}"
    heads = range(want.shape[1])
    order = [
        next((i for i in heads if state_gap(step, want[:, i : i + 1], got[:, h : h + 1], bound).error <= bound), -1)
        for h in heads
    ]
    if sorted(order) == list(heads):
        return f"of {label} the heads are in another order"
    if all(not np.any(_new(step, row, got)) for row in rows):
        return f"{label} of new tokens are not written here"
    for other, value in known.items():
        if (
            value.ndim == 3
            and value.shape[1] == step.input_ids.shape[1]
            and value.shape[2] == got.shape[1] * got.shape[3]
        ):
            flat = [_new(step, row, got).transpose(1, 0, 2).reshape(-1, value.shape[2]) for row in rows]
            if all(_same(value[row, : len(part)], part, bound) for row, part in zip(rows, flat, strict=True)):
                return f"{label} are what {_where(other, network)} is in the reference"
    return ""


def _of_tokens(step: Step, want: Array, got: Array, bound: float) -> str:
    """Each token that differs holds what another token of its row should."""
    valid = step.valid(want.shape[1])
    moved = []
    for row, token in np.argwhere(valid).tolist():
        if _same(want[row, token], got[row, token], bound):
            continue
        same = [other for other in range(want.shape[1]) if _same(want[row, other], got[row, token], bound)]
        if not same:
            return ""
        moved.append((row, token, same[0]))
    if not moved:
        return ""
    row, token, other = moved[0]
    padded = " (padding)" if other >= step.input_lens[row] else ""
    return f"{MOVED}: token {token} of row {row} holds what token {other}{padded} should"


def _of_scale(step: Step, want: Array, got: Array, bound: float) -> str:
    valid = step.valid(want.shape[1])
    w, g = want[valid].astype(np.float64).ravel(), got[valid].astype(np.float64).ravel()
    size = float(w @ w)
    factor = float(w @ g) / size if size else 1.0
    if abs(factor - 1) > bound and _same(w * factor, g, bound):
        return f"it is {factor:.4g} times the reference"
    return ""


def _new(step: Step, row: int, state: Array, shift: int = 0) -> Array:
    """Of a buffer (B, Hkv, C, D) the part (Hkv, n, D) that this step should have written in a row."""
    start = int(step.seqlen_offsets[row]) + shift
    return state[row, :, max(start, 0) : start + int(step.input_lens[row])]


def _same(want: Array, got: Array, bound: float) -> bool:
    if want.shape != got.shape:
        return False
    size = float(np.linalg.norm(want.astype(np.float64)))
    return size > 0 and float(np.linalg.norm(got.astype(np.float64) - want)) <= bound * size


def _where(name: str, network: Network | None) -> str:
    if name.startswith("present."):
        return _label(name)
    value = network.values.get(name) if network is not None else None
    return f"{name} ({value.module})" if value is not None and value.module else name


def _label(name: str) -> str:
    """`present.3.key` -> `layer 3's keys`."""
    parts = name.split(".")
    if len(parts) != 3 or name == contract.LOGITS:
        return name
    return f"layer {parts[1]}'s {parts[2]}s"
