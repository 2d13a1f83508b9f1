"""Choosing the next token of one sequence from its logits, as `SamplingParams` says.

Works on a view of the engine's logits and never changes it. Knows nothing of text or engines.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import EngineError, RequestError
from .sampling import SamplingParams

Logits = NDArray[np.float32]

_BLOCK = 256  # weights that are summed before the sums are accumulated: a running sum over all of them is 20× slower


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """logprob: natural logarithm of the model's probability. rank: 1 is the likeliest; of ties the lower id is."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token; logprob and rank if they were asked for, and the likeliest tokens of that step, best first."""

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """The sampling state of one sequence: what it has seen, and its stream of random numbers."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        *,
        stop_token_ids: Collection[int] = (),
        index: int = 0,
    ) -> None:
        """Prepare for a sequence.

        Args:
            params: validated.
            prompt_token_ids: each in [0, V); they count for the repetition penalty.
            vocab_size: V.
            stop_token_ids: suppressed until min_tokens have been sampled; those outside [0, V) cannot be anyway.
            index: which of the n samples this is.

        Raises:
            RequestError: logit_bias names a token outside the vocabulary.
        """
        outside = [token for token in params.logit_bias if token >= vocab_size]
        if outside:
            raise RequestError(f"logit_bias names token {outside[0]}, outside the vocabulary of {vocab_size}")
        self._params = params
        self._output: list[int] = []
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._suppressed = np.array([t for t in stop_token_ids if 0 <= t < vocab_size], np.int64)
        self._penalises = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._edits = self._penalises or bool(params.logit_bias or params.min_tokens or params.logits_processors)
        if self._penalises:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[np.asarray(prompt_token_ids, np.int64)] = True
            self._generated = np.zeros(vocab_size, bool)
            self._counts = np.zeros(vocab_size, np.int32)
        if self._edits or params.temperature:
            self._scratch = np.empty(vocab_size, np.float32)
        if params.temperature:
            self._random = np.random.default_rng(None if params.seed is None else [params.seed, index])

    def sample(self, logits: Logits) -> SampledToken:
        """Choose a token and remember it.

        Args:
            logits: (V,) float32; not changed. (A writeable array: numpy's argmax copies one that is read-only.)

        Raises:
            EngineError: the logits hold NaN or +inf, or are all -inf.
            RequestError: logit_bias, penalties or logits_processors leave nothing to choose from.
        """
        params = self._params
        edited = self._edit(logits) if self._edits else logits
        best = int(edited.argmax())  # the first NaN if there is one
        if not math.isfinite(edited[best]):
            raise _nothing_to_choose(logits, float(edited[best]))
        token = best if params.temperature == 0 else self._draw(edited, float(edited[best]))
        self._output.append(token)
        if self._penalises:
            self._seen[token] = self._generated[token] = True
            self._counts[token] += 1
        return SampledToken(token) if params.logprobs is None else logprobs_of(logits, token, params.logprobs)

    def _edit(self, logits: Logits) -> Logits:
        """Bias, minimum length, penalties and processors, on a copy."""
        params, edited = self._params, self._scratch
        np.copyto(edited, logits)
        if len(self._bias_ids):
            edited[self._bias_ids] += self._bias
        if len(self._output) < params.min_tokens:
            edited[self._suppressed] = -np.inf
        if params.repetition_penalty != 1:
            ids = np.flatnonzero(self._seen)
            seen = edited[ids]
            with np.errstate(over="ignore"):  # a penalty may well push a logit to -inf
                edited[ids] = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            ids = np.flatnonzero(self._generated)
            edited[ids] -= params.frequency_penalty * self._counts[ids] + params.presence_penalty
        for process in params.logits_processors:
            changed = process(tuple(self._output), edited)
            if changed is not None:
                if np.shape(changed) != edited.shape:
                    raise RequestError(f"a logits processor returned shape {np.shape(changed)}, not {edited.shape}")
                np.copyto(edited, changed)
        return edited

    def _draw(self, logits: Logits, highest: float) -> int:
        """Temperature, min_p, top_k and top_p, and a token from what they keep."""
        params, scaled = self._params, self._scratch
        with np.errstate(over="ignore"):  # what is far below the likeliest token may well become -inf
            np.subtract(logits, highest, out=scaled)
            scaled /= params.temperature
        kept: NDArray[np.int64] | None = None  # None is every token
        if params.min_p > 0:
            kept = np.flatnonzero(scaled >= math.log(params.min_p))
        if 0 < params.top_k < (len(scaled) if kept is None else len(kept)):
            values = scaled if kept is None else scaled[kept]
            inside = _largest(values, params.top_k)
            kept = inside if kept is None else kept[inside]
        weights = np.exp(scaled, out=scaled) if kept is None else np.exp(scaled[kept])
        choice = _draw_weighted(weights, params.top_p, self._random)
        return choice if kept is None else int(kept[choice])


def logprobs_of(logits: Logits, token_id: int, top: int) -> SampledToken:
    """The raw log-probability and rank of a token, and the `top` likeliest tokens.

    Args:
        logits: (V,) float32, the model's own; not changed.
        token_id: in [0, V).
        top: how many of the likeliest to list.

    Raises:
        EngineError: the logits hold NaN or +inf, or are all -inf.
    """
    highest = float(logits.max())
    if not math.isfinite(highest):
        raise _nothing_to_choose(logits, highest)
    with np.errstate(over="ignore"):
        normaliser = highest + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    best: tuple[TokenLogprob, ...] = ()
    top = min(top, len(logits))
    if top:
        ids = _largest(logits, top)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top]
        best = tuple(TokenLogprob(int(i), float(logits[i]) - normaliser, rank) for rank, i in enumerate(ids, 1))
    own = logits[token_id]
    rank = 1 + np.count_nonzero(logits > own) + np.count_nonzero(logits[:token_id] == own)
    return SampledToken(token_id, float(own) - normaliser, int(rank), best)


def _nothing_to_choose(logits: Logits, found: float) -> EngineError | RequestError:
    """The error for logits whose maximum is `found`: NaN or infinite."""
    raw = float(logits.max())
    if math.isfinite(raw):
        return RequestError(
            f"after logit_bias, penalties and logits_processors the largest logit is {found}: nothing can be chosen"
        )
    return EngineError(
        f"the largest logit is {raw}, so nothing can be chosen: the engine computed no usable logits; "
        "`zonda verify` tells whether it still matches its reference"
    )


def _largest(values: Logits, k: int) -> NDArray[np.int64]:
    """Indices of the k largest values, and of all that equal the k-th, ascending."""
    return np.flatnonzero(values >= np.partition(values, -k)[-k])


def _draw_weighted(weights: Logits, top_p: float, random: np.random.Generator) -> int:
    """An index, drawn by weight from the nucleus: the fewest heaviest whose share reaches top_p.

    No sort: a draw from all weights is a draw from the nucleus if it lies inside, that is if what is heavier (of equal
    ones, what comes before) has a share below top_p. If it lies outside, so does all that is not heavier, and
    the next draw is among the heavier ones only. The expected number of draws is at most 1 + log(1 / top_p).
    """
    if top_p == 1:
        return _draw_index(weights, random.random())
    share = top_p * float(weights.sum(dtype=np.float64))
    among: NDArray[np.int64] | None = None  # indices into weights; None is all
    while True:
        drawn = _draw_index(weights, random.random())
        own = weights[drawn]
        heavier = weights > own
        heavier[:drawn] |= weights[:drawn] == own
        inside = np.flatnonzero(heavier)
        above = weights[inside]
        if not len(inside) or float(above.sum(dtype=np.float64)) < share:
            return drawn if among is None else int(among[drawn])
        among, weights = inside if among is None else among[inside], above


def _draw_index(weights: Logits, uniform: float) -> int:
    """The index at which the running sum of the weights passes `uniform`, in [0, 1), of their total.

    Never one of weight 0: sums by block and one by one round differently, so targets are kept below the last sum.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    target = min(uniform * float(sums[-1]), math.nextafter(float(sums[-1]), 0.0))
    block = int(np.searchsorted(sums, target, side="right"))
    start = block * _BLOCK
    inner = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    if block:
        target -= float(sums[block - 1])
    return start + int(np.searchsorted(inner, min(target, math.nextafter(float(inner[-1]), 0.0)), side="right"))
