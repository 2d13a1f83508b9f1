"""The engine's side of the parity proof: an engine against golden data, teacher-forced, judged by one table.

Numpy only, so that a host that serves can run it. Where golden data come from is `export`'s matter.
`python -m zonda.runtime.parity GOLDEN` makes the proof in a process of its own.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import ParityError, ZondaError
from .engines import Engine, KvCache
from .golden import Golden
from .manifest import Contract, Limits, Parity, ScheduleReport
from .metrics import THRESHOLDS, Deviations, Thresholds, Verdict, verdicts
from .schedules import Schedule, quick_schedules, schedules


class ProofRequest(msgspec.Struct, frozen=True):
    """What to prove: a graph for ONNX Runtime by its path, how to drive it, and the thresholds' name.

    as_stored, prefill: see `OnnxRuntimeEngine`. quick: see `prove`. cache_forms: the file, none if empty.
    """

    model: str
    contract: Contract
    limits: Limits
    thresholds: str
    as_stored: bool = False
    quick: bool = False
    prefill: tuple[str, int] | None = None
    cache_forms: str = ""


def prove(
    engine: Engine,
    golden: Golden,
    thresholds: Thresholds,
    *,
    reference: str = "eager float32, the same definition",
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Hold an engine to golden data, through every schedule.

    Args:
        engine: any target.
        golden: exact at build time, a digest in a bundle.
        thresholds: of the engine's class of numerics.
        reference: what computed the golden data, in words.
        quick: the shortest prompt only.
        progress: called with the name of each schedule before it runs.

    Raises:
        ParityError: a deviation beyond the thresholds; the message says in which schedule, where, and how much.
    """
    lengths = [len(prompt) for prompt in golden.prompts]
    plans = (quick_schedules if quick else schedules)(lengths, engine.limits)
    reports: dict[str, list[_Found]] = {}
    for schedule in plans:
        progress(schedule.name)
        reports.setdefault(schedule.name, []).append(_run(engine, golden, thresholds, schedule))
    return Parity(
        status="passed",
        reference=reference,
        thresholds=thresholds,
        max_logit=golden.scale,
        schedules=tuple(_report(name, found) for name, found in reports.items()),
    )


class _Found(msgspec.Struct):
    deviations: Deviations
    ambiguous: int
    kv_error: float | None


def _run(engine: Engine, golden: Golden, thresholds: Thresholds, schedule: Schedule) -> _Found:
    cache = engine.allocate(schedule.first_row + len(schedule.rows))
    offsets = np.zeros(len(schedule.rows), np.int32)
    parts: list[Deviations] = []
    ambiguous = 0
    for number, step in enumerate(schedule.steps):
        lens = np.array(step, np.int32)
        with engine.lock:
            logits, tokens = _step(engine, cache, golden, schedule, offsets, lens)
            found = golden.compare_logits(tokens, logits)
        judged = verdicts(found, thresholds, golden.scale)
        breach = _breach(found, judged, thresholds, golden.scale)
        if breach is not None:
            index, words = breach
            row = int(np.searchsorted(golden.starts, tokens[index], side="right")) - 1
            raise ParityError(
                f"the engine differs from the reference: schedule '{schedule.name}', step {number} "
                f"({'+'.join(map(str, step))} new tokens), prompt {row}, token {tokens[index] - golden.starts[row]}: "
                f"{words}"
            )
        parts.append(found)
        ambiguous += sum(verdict is Verdict.AMBIGUOUS for verdict in judged)
        offsets = offsets + lens
    errors = _state_errors(cache, golden, thresholds, schedule)
    joined = Deviations.join(parts)
    _require_distribution(joined, thresholds, schedule)
    return _Found(joined, ambiguous, errors)


def _require_distribution(found: Deviations, thresholds: Thresholds, schedule: Schedule) -> None:
    """Raise if the probabilities of a whole schedule are too far off; the logits of each token may look innocent."""
    kl, growth = float(found.kl.mean()), found.certain_perplexity_ratio - 1
    for words, value, allowed in (
        ("the KL divergence from it is {:.3g} nats, {:.3g} is allowed", kl, thresholds.kl),
        ("the perplexity grew by {:.3g} at least, {:.3g} is allowed", growth, thresholds.perplexity),
    ):
        if allowed is not None and not value <= allowed:
            raise ParityError(
                f"the engine differs from the reference: schedule '{schedule.name}': {words.format(value, allowed)}"
            )


def _step(
    engine: Engine,
    cache: KvCache,
    golden: Golden,
    schedule: Schedule,
    offsets: NDArray[np.int32],
    lens: NDArray[np.int32],
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Feed a step; return the logits of its valid tokens (n, V) and which golden tokens (n,) they are."""
    batch, width = len(lens), int(lens.max())
    ids = np.zeros((batch, width), np.int64)
    for b, row in enumerate(schedule.rows):
        ids[b, : lens[b]] = golden.prompts[row][offsets[b] : offsets[b] + lens[b]]
    if schedule.last_only:
        positions = np.maximum(lens - 1, 0)[:, None].astype(np.int64)  # (B, 1)
    else:
        positions = np.arange(width)[None].repeat(batch, 0)
    logits = engine.step(cache, schedule.first_row, ids, offsets, lens, positions)
    starts = np.array(golden.starts)[list(schedule.rows)]
    valid = (positions < lens[:, None]) & (lens[:, None] > 0)
    return logits[valid], ((starts + offsets)[:, None] + positions)[valid].astype(np.intp)


def _breach(
    found: Deviations, judged: Sequence[Verdict], thresholds: Thresholds, scale: float
) -> tuple[int, str] | None:
    """The first token that is out of bounds, and the words for it."""
    bounds = (
        (
            "the logits are off by {:.3g} of the largest, {:.3g} is allowed",
            found.max_error / scale,
            thresholds.max_error,
        ),
        (
            "the logits are off by {:.3g} of their norm, {:.3g} is allowed",
            found.relative_error,
            thresholds.relative_error,
        ),
        (
            "the norm of the logits is off by {:.3g}, {:.3g} is allowed",
            np.abs(found.norm_ratio - 1),
            thresholds.norm_ratio,
        ),
    )
    over = [~(values <= allowed) for _, values, allowed in bounds]  # a NaN is over
    failed = np.array([verdict is Verdict.FAIL for verdict in judged])
    wrong = np.flatnonzero(np.any(over, axis=0) | failed)
    if not len(wrong):
        return None
    first = int(wrong[0])
    words = [
        text.format(values[first], allowed) for (text, values, allowed), o in zip(bounds, over, strict=True) if o[first]
    ]
    if failed[first]:
        words.append("another token is the likeliest")
    return first, "; ".join(words)


def _state_errors(cache: KvCache, golden: Golden, thresholds: Thresholds, schedule: Schedule) -> float | None:
    """The largest error of a state tensor of a row, once the whole row is cached."""
    if not golden.kv_norms.size:
        return None
    worst = 0.0
    for b, row in enumerate(schedule.rows):
        states = cache.read(schedule.first_row + b, len(golden.prompts[row]))
        errors = golden.compare_states(row, states)
        bad = np.flatnonzero(~(errors <= thresholds.kv_error))
        if len(bad):
            layer, kind = divmod(int(bad[0]), 2)
            raise ParityError(
                f"the engine differs from the reference: schedule '{schedule.name}', prompt {row}: the "
                f"{('keys', 'values')[kind]} that layer {layer} cached are off by {errors[bad[0]]:.3g} of their norm, "
                f"{thresholds.kv_error:.3g} is allowed"
            )
        worst = max(worst, float(errors.max()))
    return worst


def _report(name: str, found: Sequence[_Found]) -> ScheduleReport:
    joined = Deviations.join([part.deviations for part in found])
    farthest = int(np.abs(joined.norm_ratio - 1).argmax())
    mean = float(joined.mean_error.mean())
    return ScheduleReport(
        name=name,
        tokens=len(joined),
        cosine=float(joined.cosine.min()),
        norm_ratio=float(joined.norm_ratio[farthest]),
        relative_error=float(joined.relative_error.max()),
        max_error=float(joined.max_error.max()),
        mean_error=mean if np.isfinite(mean) else None,
        top1_agreement=float(joined.agrees.mean()),
        near_ties=sum(part.ambiguous for part in found),
        top10_overlap=float(joined.overlap.mean()),
        kv_error=max((part.kv_error for part in found if part.kv_error is not None), default=None),
        kl=float(joined.kl.mean()),
        perplexity_ratio=joined.perplexity_ratio,
    )


def main(golden_file: str) -> int:
    """Prove what the `ProofRequest` on standard input asks, by golden data in a file.

    The record goes to standard output as JSON; an error to standard error, with status 1.
    """
    from .engines.onnxruntime import OnnxRuntimeEngine

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProofRequest)
    try:
        engine = OnnxRuntimeEngine(
            Path(request.model),
            request.contract,
            request.limits,
            as_stored=request.as_stored,
            prefill=request.prefill and (Path(request.prefill[0]), request.prefill[1]),
            cache_forms=Path(request.cache_forms) if request.cache_forms else None,
        )
        golden = Golden.read(Path(golden_file))
        parity = prove(engine, golden, THRESHOLDS[request.thresholds], quick=request.quick)
    except ZondaError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(parity))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
