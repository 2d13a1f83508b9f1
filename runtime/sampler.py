"""Choosing the next token of one sequence from its logits, as `SamplingParams` says.

Works on a view of the engine's logits and never changes it. Knows nothing of text or engines.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import EngineError, RequestError
from .sampling import SamplingParams

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """logprob: natural logarithm of the model's probability. rank: 1 is the likeliest."""

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
            prompt_token_ids: count for the repetition penalty.
            vocab_size: V.
            stop_token_ids: suppressed until min_tokens have been sampled.
            index: which of the n samples this is.

        Raises:
            RequestError: logit_bias names a token outside the vocabulary.
        """
        self._params = params
        self._output: list[int] = []
        if any(token >= vocab_size for token in params.logit_bias):
            raise RequestError(f"logit_bias names a token outside the vocabulary of {vocab_size}")
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._suppressed = np.array(sorted(t for t in stop_token_ids if t < vocab_size), np.int64)
        self._penalises = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._edits = self._penalises or bool(params.logit_bias or params.min_tokens or params.logits_processors)
        if self._penalises:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[np.asarray(prompt_token_ids, np.int64)] = True
            self._counts = np.zeros(vocab_size, np.int32)
        self._scratch = np.empty(vocab_size, np.float32) if self._edits or params.temperature else None
        self._random = np.random.default_rng(None if params.seed is None else [params.seed, index])

    def sample(self, logits: Logits) -> SampledToken:
        """Choose a token and remember it.

        Args:
            logits: (V,) float32; not changed.

        Raises:
            EngineError: the logits hold NaN or infinity, or nothing is left to choose from.
        """
        params = self._params
        edited = self._edit(logits) if self._edits else logits
        best = int(edited.argmax())
        if not np.isfinite(edited[best]):
            raise EngineError(f"the logits have no finite maximum ({edited[best]}): nothing can be chosen from them")
        token = best if params.temperature == 0 else self._draw(edited, float(edited[best]))
        self._output.append(token)
        if self._penalises:
            self._seen[token] = True
            self._counts[token] += 1
        return SampledToken(token) if params.logprobs is None else logprobs_of(logits, token, params.logprobs)

    def _edit(self, logits: Logits) -> Logits:
        """Bias, minimum length, penalties and processors, on a copy."""
        params, edited = self._params, self._scratch
        assert edited is not None
        np.copyto(edited, logits)
        if len(self._bias_ids):
            edited[self._bias_ids] += self._bias
        if len(self._output) < params.min_tokens:
            edited[self._suppressed] = -np.inf
        if self._penalises:
            if params.repetition_penalty != 1:
                ids = np.flatnonzero(self._seen)
                seen = edited[ids]
                edited[ids] = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            ids = np.flatnonzero(self._counts)
            edited[ids] -= params.frequency_penalty * self._counts[ids] + params.presence_penalty
        for process in params.logits_processors:
            changed = process(tuple(self._output), edited)
            if changed is not None:
                if changed.shape != edited.shape:
                    raise RequestError(f"a logits processor returned shape {changed.shape}, not {edited.shape}")
                np.copyto(edited, changed)
        return edited

    def _draw(self, logits: Logits, highest: float) -> int:
        """Temperature, min_p, top_k, top_p, and one random number."""
        params = self._params
        scaled = self._scratch
        assert scaled is not None
        np.subtract(logits, highest, out=scaled)  # the likeliest token is at 0
        scaled /= params.temperature
        kept: NDArray[np.int64] | None = None  # None is every token
        if params.min_p > 0:
            kept = np.flatnonzero(scaled >= np.log(params.min_p))
        if 0 < params.top_k < (len(scaled) if kept is None else len(kept)):
            values = scaled if kept is None else scaled[kept]
            kth = np.partition(values, -params.top_k)[-params.top_k]
            inside = np.flatnonzero(values >= kth)
            kept = inside if kept is None else kept[inside]
        weights = np.exp(scaled if kept is None else scaled[kept])
        if params.top_p < 1:
            kept, weights = _nucleus(kept, weights, params.top_p)
        sums = np.cumsum(weights, dtype=np.float64)
        choice = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        return choice if kept is None else int(kept[choice])


def logprobs_of(logits: Logits, token_id: int, top: int) -> SampledToken:
    """The raw log-probability and rank of a token, and the `top` likeliest tokens.

    Args:
        logits: (V,) float32, the model's own.
        token_id: in [0, V).
        top: how many of the likeliest to list.
    """
    highest = float(logits.max())
    normaliser = highest + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))
    best: tuple[TokenLogprob, ...] = ()
    top = min(top, len(logits))
    if top:
        ids = np.argpartition(logits, -top)[-top:]
        ids = ids[np.lexsort((ids, -logits[ids]))]
        best = tuple(TokenLogprob(int(i), float(logits[i]) - normaliser, rank) for rank, i in enumerate(ids, 1))
    rank = int(np.count_nonzero(logits > logits[token_id])) + 1
    return SampledToken(token_id, float(logits[token_id]) - normaliser, rank, best)


def _nucleus(
    kept: NDArray[np.int64] | None, weights: NDArray[np.float32], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The fewest likeliest tokens whose share reaches top_p.

    Tokens lighter than (1 - top_p) · total / V cannot be among them, because all of them together weigh no more than
    the part that is cut off; so only the others are sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    heavy = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = heavy[np.argsort(-weights[heavy], kind="stable")]
    sums = np.cumsum(weights[order], dtype=np.float64)
    count = int(np.searchsorted(sums, top_p * total, side="left")) + 1
    chosen = order[:count]
    return (chosen if kept is None else kept[chosen]), weights[chosen]
