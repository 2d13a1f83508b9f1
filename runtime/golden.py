"""Golden data: what the reference computed on some prompts, small enough to travel in a bundle.

Of each token's logits the sixteen largest, the norm and a sketch are kept; of each row's keys and values the norm and
a sketch. A sketch is linear, so the norm of a difference can be estimated from two of them: with 64 buckets its
standard error is 9 %. At build time the full logits lie beside it and everything is exact.

Knows arrays and one file; nothing of engines or of where the reference came from.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .. import BundleError
from .metrics import TOP, Deviations, deviations, largest, overlap

GOLDEN = "golden.safetensors"
FORMAT = "zonda-golden-2"
BUCKETS = 64
KEPT = 16
"""Largest logits kept a token: the ten of the overlap, and some that the reference holds for nearly as likely."""
_TOGETHER = 16  # tokens that are worked on at once: the float64 copies of all would be larger than many a model


@dataclass(frozen=True, slots=True)
class Golden:
    """What the reference computed, N tokens of R prompts one after the other, T state tensors.

    prompts: R arrays of token ids. top_ids, top_logits: (N, 16), largest first. norms: (N,) of the logits. peaks: (N,)
    max |logit|. normalizers: (N,) log of the sum of exponentials. followers: (N,) logit of the prompt's next token, NaN
    for its last. sketches: (N, 64). kv_norms: (R, T); kv_sketches: (R, T, 64), of all tokens of a row. vocab_size: V.
    logits: (N, V) at build time, None in a bundle.
    """

    prompts: tuple[NDArray[np.int64], ...]
    vocab_size: int
    top_ids: NDArray[np.int32]
    top_logits: NDArray[np.float32]
    norms: NDArray[np.float64]
    peaks: NDArray[np.float32]
    normalizers: NDArray[np.float64]
    followers: NDArray[np.float32]
    sketches: NDArray[np.float32]
    kv_norms: NDArray[np.float64]
    kv_sketches: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[NDArray[np.int64]],
        logits: NDArray[np.float32],
        states: Sequence[Sequence[NDArray[np.floating]]],
    ) -> Self:
        """Record.

        Args:
            prompts: token ids of each row.
            logits: (N, V), of all tokens of all rows, row by row.
            states: of each row the T state tensors (Hkv, length, D).
        """
        best = np.concatenate([_likeliest(logits[i : i + _TOGETHER]) for i in range(0, len(logits), _TOGETHER)])
        flat = [[state.astype(np.float64).ravel() for state in row] for row in states]
        return cls(
            prompts=tuple(prompts),
            vocab_size=logits.shape[1],
            top_ids=best.astype(np.int32),
            top_logits=np.take_along_axis(logits, best, 1),
            norms=np.array([np.linalg.norm(row.astype(np.float64)) for row in logits]),
            peaks=np.array([np.abs(row).max() for row in logits]),
            normalizers=np.array([_log_sum_exp(row[None])[0] for row in logits]),
            followers=_logits_of(logits, _following(prompts)),
            sketches=sketch(logits),
            kv_norms=np.array([[np.linalg.norm(state) for state in row] for row in flat]),
            kv_sketches=np.array([[sketch(state[None])[0] for state in row] for row in flat]),
            logits=logits,
        )

    @property
    def starts(self) -> list[int]:
        """Index of each row's first token among the N."""
        lengths = [len(prompt) for prompt in self.prompts]
        return [sum(lengths[:row]) for row in range(len(lengths))]

    @property
    def scale(self) -> float:
        """max |logit| of all tokens."""
        return float(self.peaks.max())

    def compare_logits(self, tokens: NDArray[np.intp], got: NDArray[np.float32]) -> Deviations:
        """Compare logits (n, V) with those of the tokens (n,), exactly if the full logits are here."""
        parts = [slice(start, start + _TOGETHER) for start in range(0, len(tokens), _TOGETHER)]
        return Deviations.join([self._compare(tokens[part], got[part]) for part in parts])

    def _compare(self, tokens: NDArray[np.intp], got: NDArray[np.float32]) -> Deviations:
        if self.logits is not None:
            return deviations(self.logits[tokens], got, _following(self.prompts)[tokens])
        rows, following = np.arange(len(tokens)), _following(self.prompts)[tokens]
        top_ids, top = self.top_ids[tokens], self.top_logits[tokens].astype(np.float64)
        want_norm, got_norm = self.norms[tokens], np.linalg.norm(got.astype(np.float64), axis=1)
        distance = np.linalg.norm(sketch(got).astype(np.float64) - self.sketches[tokens], axis=1)
        chosen = got.argmax(1)
        place = top_ids == chosen[:, None]
        gap = np.where(place.any(1), top[:, 0] - np.where(place, top, 0.0).sum(1), np.nan)
        at_top = np.take_along_axis(got, top_ids.astype(np.int64), 1)
        normalizers, own = self.normalizers[tokens], _log_sum_exp(got)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (want_norm**2 + got_norm**2 - distance**2) / (2 * want_norm * got_norm)
            ratio, relative = got_norm / want_norm, distance / want_norm
        return Deviations(
            cosine=np.minimum(cosine, 1.0),
            norm_ratio=ratio,
            relative_error=relative,
            max_error=np.abs(at_top - top).max(1),
            mean_error=np.full(len(rows), np.nan),
            agrees=chosen == top_ids[:, 0],
            gap=gap,
            overlap=overlap(top_ids[:, :TOP].astype(np.int64), largest(got, TOP)),
            scale=self.peaks[tokens].astype(np.float64),
            kl=_coarse_kl(
                top - normalizers[:, None], np.take_along_axis(got, top_ids.astype(np.int64), 1) - own[:, None]
            ),
            surprise=self.followers[tokens] - normalizers - (_logits_of(got, following) - own),
        )

    def compare_states(self, row: int, states: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """Estimated ‖got - want‖ / ‖want‖ of each state tensor (Hkv, length, D) of a whole row: (T,)."""
        found = np.array([sketch(state.astype(np.float64).reshape(1, -1))[0] for state in states])
        distance = np.linalg.norm(found.astype(np.float64) - self.kv_sketches[row], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((distance == 0) & (self.kv_norms[row] == 0), 0.0, distance / self.kv_norms[row])

    def digest(self) -> Self:
        """Without the full logits: what a bundle carries."""
        return replace(self, logits=None)

    def save(self, path: Path) -> None:
        """Write a safetensors file; the full logits too if they are here."""
        from safetensors.numpy import save

        tensors = {name: getattr(self, name) for name in _ARRAYS}
        tensors["token_ids"] = np.concatenate(self.prompts)
        tensors["lengths"] = np.array([len(prompt) for prompt in self.prompts], np.int64)
        if self.logits is not None:
            tensors["logits"] = self.logits
        path.write_bytes(save(tensors, {"format": FORMAT, "vocab_size": str(self.vocab_size)}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            BundleError: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BundleError(f"{path} holds no golden data of format {FORMAT}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                lengths = tensors["lengths"]
                prompts = tuple(np.split(tensors["token_ids"], np.cumsum(lengths)[:-1]))
                arrays = {name: tensors[name] for name in _ARRAYS}
                return cls(prompts, int(metadata["vocab_size"]), **arrays, logits=tensors.get("logits"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise BundleError(f"{path} is not readable golden data: {error}") from error


def _following(prompts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The token that follows each of the N in its prompt, -1 for the last."""
    return np.concatenate([np.append(prompt[1:], -1) for prompt in prompts])


def _logits_of(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """One logit a row of (n, V); NaN for token -1."""
    return np.where(tokens >= 0, logits[np.arange(len(tokens)), tokens], np.float32(np.nan))


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row: (n, V) -> (n,)."""
    wide = logits.astype(np.float64)
    peaks = wide.max(1)
    return np.asarray(peaks + np.log(np.exp(wide - peaks[:, None]).sum(1)))


def _coarse_kl(want: NDArray[np.floating], got: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL divergence over the tokens of (n, k) log-probabilities and all the others together, which bounds it below."""
    p, q = want.astype(np.float64), got.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    others = [np.log(np.maximum(1 - np.exp(x).sum(1), tiny)) for x in (p, q)]
    return np.asarray((np.exp(p) * (p - q)).sum(1) + np.exp(others[0]) * (others[0] - others[1]))


def _likeliest(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Indices of the sixteen largest of each row, largest first: (n, V) -> (n, 16)."""
    best = largest(logits, KEPT)
    order = np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


_ARRAYS = (
    "top_ids",
    "top_logits",
    "norms",
    "peaks",
    "normalizers",
    "followers",
    "sketches",
    "kv_norms",
    "kv_sketches",
)


def sketch(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """CountSketch of each row (Charikar, Chen & Farach-Colton 2002): (N, n) -> (N, 64).

    Every element is added to one bucket with a sign; which and what is a fixed hash of its index, the same everywhere.
    The squared norm of a sketch has the squared norm of the row as its mean.
    """
    order, signs, starts, filled = _plan(rows.shape[1])
    sketches = np.zeros((len(rows), BUCKETS), np.float32)
    for index, row in enumerate(rows):  # row by row: a second copy of all logits would be large
        sketches[index, filled] = np.add.reduceat(row[order].astype(np.float64) * signs, starts)
    return sketches


@functools.lru_cache(maxsize=8)
def _plan(
    size: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Elements ordered by bucket, their signs, where each filled bucket starts, and which it is."""
    hashed = _splitmix64(np.arange(1, size + 1, dtype=np.uint64))
    buckets = (hashed % np.uint64(BUCKETS)).astype(np.int64)
    order = np.argsort(buckets, kind="stable")
    signs = np.where(hashed >> np.uint64(63), -1.0, 1.0)[order]
    filled, starts = np.unique(buckets[order], return_index=True)
    return order, signs, starts.astype(np.int64), filled


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A well mixed 64-bit hash (Steele, Lea & Flood 2014, figure 6)."""
    z = state * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
