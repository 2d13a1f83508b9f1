"""Choosing the next token of each sequence from its logits, as `SamplingParams` says.

A step is a search and a choice. The search finds the likeliest token, or with top_k the tokens that can be among the k
likeliest; it only compares, so rows that lie together are searched together, with the result of one by one. The choice
is each sequence's own, with its own random numbers. Works on views of the engine's logits and never changes them; knows
nothing of text or engines.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import EngineError, RequestError
from .drawing import Logits, draw_weighted, largest, likeliest, slightly_below, uniforms
from .sampling import SamplingParams

_FEW = 2048  # candidates up to which sorting them is the shortest way through all filters


class TokenLogprob(NamedTuple):
    """logprob: natural logarithm of the model's probability. rank: 1 is the likeliest; of ties the lower id is."""

    token_id: int
    logprob: float
    rank: int


class SampledToken(NamedTuple):
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
            self._uniforms = uniforms(np.random.default_rng(None if params.seed is None else [params.seed, index]))
        self._top_k = params.top_k if params.temperature else 0
        self._min_p_distance = -math.log(params.min_p) if params.min_p else math.inf

    @property
    def search(self) -> int | None:
        """What to search for in the model's logits: k with top_k, else 0; None if they must be edited first."""
        return None if self._edits else self._top_k

    def sample(self, logits: Logits) -> SampledToken:
        """Choose a token and remember it.

        Args:
            logits: (V,) float32; not changed. (A writeable array: numpy's argmax copies one that is read-only.)

        Raises:
            EngineError: the logits hold NaN or +inf, or are all -inf.
            RequestError: logit_bias, penalties or logits_processors leave nothing to choose from.
        """
        edited = self._edit(logits) if self._edits else logits
        if self._top_k:
            ((highest, candidates),) = likeliest(edited[None], self._top_k)
            return self.choose(logits, edited, highest, candidates)
        best = int(edited.argmax())  # the first NaN if there is one
        return self.choose(logits, edited, edited.item(best), best)

    def choose(self, logits: Logits, edited: Logits, highest: float, found: "Found") -> SampledToken:
        """The second half of `sample`: choose after a search, and remember the choice.

        Args:
            logits: (V,) the model's.
            edited: (V,) what was searched; the same if `search` is not None.
            highest: the largest of them.
            found: what the search found.

        Raises:
            EngineError, RequestError: as of `sample`.
        """
        params = self._params
        if not math.isfinite(highest):
            raise _nothing_to_choose(logits, highest)
        if not isinstance(found, int):
            token = self._draw(edited, highest, found)
        else:
            token = self._draw(edited, highest, None) if params.temperature else found
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

    def _draw(self, logits: Logits, highest: float, candidates: NDArray[np.int64] | None) -> int:
        """Temperature, min_p, top_k and top_p, and a token from what they keep, which the candidates hold if given."""
        params, scaled = self._params, self._scratch
        if candidates is None and params.min_p > 0:
            far = self._min_p_distance * params.temperature
            candidates = np.flatnonzero(logits >= slightly_below(highest - far, far))
        if candidates is not None and len(candidates) <= _FEW:
            return self._draw_sorted(logits, highest, candidates)
        with np.errstate(over="ignore"):  # what is far below the likeliest token may well become -inf
            np.subtract(logits, highest, out=scaled)
            scaled /= params.temperature
        kept: NDArray[np.int64] | None = None  # None is every token
        if params.min_p > 0:
            kept = np.flatnonzero(scaled >= -self._min_p_distance)
        if 0 < params.top_k < (len(scaled) if kept is None else len(kept)):
            values = scaled if kept is None else scaled[kept]
            inside = largest(values, params.top_k)
            kept = inside if kept is None else kept[inside]
        weights = np.exp(scaled, out=scaled) if kept is None else np.exp(scaled[kept])
        choice = draw_weighted(weights, params.top_p, self._uniforms)
        return choice if kept is None else int(kept[choice])

    def _draw_sorted(self, logits: Logits, highest: float, candidates: NDArray[np.int64]) -> int:
        """`_draw` among a few: in order of their distance from the likeliest, every filter keeps a first part."""
        params = self._params
        with np.errstate(over="ignore"):
            distances = highest - logits[candidates]
            distances /= params.temperature
        order = distances.argsort(kind="stable")
        distances = distances[order]
        kept = len(distances)
        if params.min_p > 0:
            kept = int(distances.searchsorted(np.float32(self._min_p_distance), side="right"))
        if 0 < params.top_k < kept:
            kept = int(distances[:kept].searchsorted(distances[params.top_k - 1], side="right"))
        sums = np.cumsum(np.exp(-distances[:kept]), dtype=np.float64)
        last = sums.item(-1)
        if params.top_p < 1:
            last = sums.item(int(sums.searchsorted(params.top_p * last)))
        drawn = sums.searchsorted(min(next(self._uniforms) * last, math.nextafter(last, 0.0)), side="right")
        return candidates.item(order.item(drawn))


Found = int | NDArray[np.int64] | None
"""What a search found: the likeliest token; with top_k ascending ids that hold all that it can keep; None is any id."""


def sample_rows(samplers: Sequence[Sampler], logits: Logits) -> list[SampledToken]:
    """`Sampler.sample` of each row, exactly; neighbouring rows with the same search share it.

    Args:
        samplers: one a row.
        logits: (B, V) float32; not changed.

    Raises:
        EngineError, RequestError: as of `Sampler.sample`, for the first row that has nothing to choose from.
    """
    if len(samplers) == 1:
        return [samplers[0].sample(logits[0])]
    sampled: list[SampledToken] = []
    for k, run in itertools.groupby(range(len(samplers)), lambda row: samplers[row].search):
        rows = list(run)
        if k is None or len(rows) == 1:
            sampled += [samplers[row].sample(logits[row]) for row in rows]
            continue
        together = logits[rows[0] : rows[-1] + 1]
        found: Sequence[tuple[float, Found]]
        if k:
            found = likeliest(together, k)
        else:
            found = [(together.item(i, best), best) for i, best in enumerate(together.argmax(1).tolist())]
        for row, (highest, one) in zip(rows, found, strict=True):
            sampled.append(samplers[row].choose(logits[row], logits[row], highest, one))
    return sampled


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
        ids = largest(logits, top)
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
