"""How far two computations are apart: logits a token, and KV contents. One module for build, `verify` and `compare`.

Numpy only. Knows arrays; nothing of engines, bundles or where the numbers come from.

Two things have to hold at every token. The logits must be close as a whole: cosine and norm ratio, because the cosine
alone is blind to scale. And the choice must be the same: top-1, where a near tie that falls the other way is told
apart from a mistake.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

TOP = 10
"""Of how many of the likeliest tokens the overlap is taken."""


class Verdict(StrEnum):
    """PASS: the same choice. AMBIGUOUS: another one, but the reference holds both for equal within the noise."""

    PASS = "pass"
    AMBIGUOUS = "ambiguous"
    FAIL = "fail"


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """What a class of numerics may differ by, a token.

    name: dtype and quality class, as the manifest says it.
    relative_error: ‖got - want‖ / ‖want‖ of the logits.
    norm_ratio: |‖got‖ / ‖want‖ - 1|.
    max_error: max |got - want| / max |want|, of all logits of all tokens.
    near_tie: a top-1 that differs is ambiguous if the reference's two logits are this close, by max |want|.
    kv_error: ‖got - want‖ / ‖want‖ of one layer's keys or values of one row.
    kl: mean KL divergence of a schedule's tokens, in nats. perplexity: relative growth of a schedule's perplexity. None
        where rounding is too small for either to show.
    """

    name: str
    relative_error: float
    norm_ratio: float
    max_error: float
    near_tie: float
    kv_error: float
    kl: float | None = None
    perplexity: float | None = None


def _of_unit_roundoff(name: str, unit: float) -> Thresholds:
    """Thresholds for a computation whose elementary operations are rounded to `unit`.

    An L-layer transformer adds 2L roundings to its residual stream, each amplified by what follows. Of the largest
    logit, float32 models of 2 to 30 layers were measured 10 to 50 units from another float32 execution
    (SmolLM2-135M: 1.1e-4 at 41, 45 units), keys and values 42 units of their norm; deeper models do more: 160. Of the
    norm of a token's logits, which has no large entry to compare with, the error is up to four times that (167 units
    measured): 640. A norm ratio sees only the part of an error that lies along the logits, the smallest: 160.
    """
    bound = 160 * unit
    return Thresholds(
        name=name, relative_error=4 * bound, norm_ratio=bound, max_error=bound, near_tie=2 * bound, kv_error=bound
    )


def _of_quality(name: str, unit: float, kl: float, perplexity: float, *, kv_unit: float | None = None) -> Thresholds:
    """Thresholds for a quantised engine, whose activations are rounded to 8 bits.

    With a scale a block such a rounding is off by at most 2^-8 of the block's largest value, typically by a quarter of
    that: a unit of 2^-10. With a scale a token, and the weights rounded as well, it is twice that, and a first token,
    whose activations are large in a few places only, was measured 114 units of the largest logit off and 147 of its
    norm. But a token's worst logit says little here, and the bound lets much pass. What counts is the distribution over
    many tokens: the mean KL divergence, and by how much perplexity grew at least, because on the few hundred golden
    tokens it has a standard error of half a percent, and on a short schedule of several.

    kv_unit: of keys and values, if it is not that of the logits.
    """
    loose, states = _of_unit_roundoff(name, unit), _of_unit_roundoff(name, kv_unit or unit)
    return msgspec.structs.replace(loose, kv_error=2 * states.kv_error, kl=kl, perplexity=perplexity)


_CACHE_UNIT = 2.0**-11
"""What a KV cache in int8 adds: with a scale a channel fixed at build, its rounding is off by half a percent of a key
or value, less than a linear's with activations of 8 bits. Sharp attention makes more of it: logits get twice that.
"""

THRESHOLDS: dict[str, Thresholds] = {
    t.name: t
    for t in (
        _of_unit_roundoff("float32", 2.0**-24),
        _of_unit_roundoff("float16", 2.0**-11 / 4),  # accumulates in float32, so roundings average out over a row
        _of_unit_roundoff("bfloat16", 2.0**-8 / 4),
        _of_quality("balanced", 2.0**-10, 0.03, 0.03),
        _of_quality("fast", 2.0**-9, 0.15, 0.15),
        _of_quality("int8-cache", 2 * _CACHE_UNIT, 0.02, 0.02, kv_unit=_CACHE_UNIT),
        _of_quality("balanced-int8-cache", 2.0**-10 + _CACHE_UNIT, 0.04, 0.05),
        _of_quality("fast-int8-cache", 2.0**-9 + _CACHE_UNIT, 0.16, 0.17),
    )
}
"""Class of numerics -> thresholds. The bound on the largest logit: float32 9.5e-6, float16 2.0e-2, bfloat16 0.16."""


def thresholds_of(quality: str, *, int8_cache: bool = False) -> str:
    """Name of the thresholds for a class of quality of ONNX Runtime's arithmetic, its cache in floats or in int8."""
    if quality == "exact":
        return "int8-cache" if int8_cache else "float32"
    return f"{quality}-int8-cache" if int8_cache else quality


@dataclass(frozen=True, slots=True)
class Deviations:
    """Of N tokens, an array (N,) each.

    cosine: between the two logit vectors. norm_ratio: ‖got‖ / ‖want‖. relative_error: ‖got - want‖ / ‖want‖.
    max_error: max |got - want|. mean_error: mean |got - want|, NaN where only a digest of the reference is known.
    agrees: the same top-1. gap: reference logit of its own top-1 less that of the other's choice, NaN if unknown.
    overlap: how many of the reference's top 10 are among the other's, as a share.
    scale: max |want|.
    kl: KL(want ‖ got) in nats; a lower bound of it where only a digest of the reference is known.
    surprise: by how much the log-probability of the token that follows sank; NaN where none follows.
    """

    cosine: Float64
    norm_ratio: Float64
    relative_error: Float64
    max_error: Float64
    mean_error: Float64
    agrees: NDArray[np.bool_]
    gap: Float64
    overlap: Float64
    scale: Float64
    kl: Float64
    surprise: Float64

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the engine by that of the reference, on the tokens that are followed by one; else 1."""
        known = self.surprise[~np.isnan(self.surprise)]
        return float(np.exp(known.mean())) if len(known) else 1.0

    @property
    def certain_perplexity_ratio(self) -> float:
        """The same less three standard errors of its logarithm: by how much perplexity grew at least."""
        known = self.surprise[~np.isnan(self.surprise)]
        return float(np.exp(known.mean() - 3 * known.std() / len(known) ** 0.5)) if len(known) else 1.0

    @classmethod
    def join(cls, parts: "list[Deviations]") -> Self:
        """One after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.cosine)


def deviations(
    want: NDArray[np.floating], got: NDArray[np.floating], following: NDArray[np.integer] | None = None
) -> Deviations:
    """Compare logits token by token.

    Args:
        want: (N, V), the reference.
        got: (N, V).
        following: (N,), the token that follows each, -1 for none.
    """
    rows = np.arange(len(want))
    w, g = want.astype(np.float64), got.astype(np.float64)
    difference = g - w
    want_norm, got_norm = _norm(w), _norm(g)
    absolute = np.abs(difference)
    p, q = log_softmax(w), log_softmax(g)
    next_ = np.full(len(w), -1) if following is None else following
    best, chosen = w.argmax(1), g.argmax(1)
    return Deviations(
        cosine=_ratio((w * g).sum(1), want_norm * got_norm, 1.0),
        norm_ratio=_ratio(got_norm, want_norm, 1.0),
        relative_error=_ratio(_norm(difference), want_norm, 0.0),
        max_error=absolute.max(1),
        mean_error=absolute.mean(1),
        agrees=best == chosen,
        gap=w[rows, best] - w[rows, chosen],
        overlap=overlap(largest(w, TOP), largest(g, TOP)),
        scale=np.abs(w).max(1),
        kl=np.asarray((np.exp(p) * (p - q)).sum(1)),
        surprise=np.where(next_ >= 0, p[rows, next_] - q[rows, next_], np.nan),
    )


def largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest of each row (N, V), in no order; all of them if V is smaller."""
    count = min(count, values.shape[1])
    return np.argpartition(values, -count, axis=1)[:, -count:]


def overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> Float64:
    """Share of each row of `first` that is in the same row of `second`."""
    return np.asarray((first[:, :, None] == second[:, None, :]).any(2).mean(1))


def verdicts(found: Deviations, thresholds: Thresholds, scale: float) -> list[Verdict]:
    """Judge the choice at each token; a NaN anywhere is a failure.

    Args:
        found: of `deviations`.
        thresholds: whose near_tie counts.
        scale: max |want| over all tokens of the comparison.
    """
    finite = np.isfinite(found.relative_error)
    tie = found.gap <= thresholds.near_tie * scale  # False for a NaN
    codes = np.where(finite & found.agrees, Verdict.PASS, np.where(finite & tie, Verdict.AMBIGUOUS, Verdict.FAIL))
    return [Verdict(code) for code in codes]


def relative_error(want: NDArray[np.floating], got: NDArray[np.floating]) -> float:
    """‖got - want‖ / ‖want‖ over all elements; of two zeros it is 0."""
    w, g = want.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    return float(_ratio(_norm((g - w)[None]), _norm(w[None]), 0.0)[0])


def log_softmax(logits: NDArray[np.floating]) -> Float64:
    """Natural logarithms of the probabilities, over the last axis, in float64."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # an infinity becomes a NaN, which fails whoever judges it
        wide -= wide.max(-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def kl_divergence(want: NDArray[np.floating], got: NDArray[np.floating]) -> Float64:
    """KL(want ‖ got) a token, in nats (Kullback & Leibler 1951): (N, V) and (N, V) logits -> (N,)."""
    p, q = log_softmax(want), log_softmax(got)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def perplexity(logits: NDArray[np.floating], following: NDArray[np.integer]) -> float:
    """exp of the mean negative log-probability of the tokens that follow: logits (N, V), following (N,)."""
    chosen = log_softmax(logits)[np.arange(len(following)), following]
    return float(np.exp(-chosen.mean()))


def _norm(rows: Float64) -> Float64:
    return np.asarray(np.linalg.norm(rows, axis=1))


def _ratio(part: Float64, whole: Float64, of_zeros: float) -> Float64:
    """part / whole; 0 / 0 is `of_zeros`, anything else by 0 infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((part == 0) & (whole == 0), of_zeros, part / whole)
