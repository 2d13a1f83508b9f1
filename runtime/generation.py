"""The generation loop: sequences in, sampled tokens and text out, over the rows of one KV cache.

A sequence is prefilled alone, chunk by chunk and without padding; then all sequences decode together, one token a
step. A finished row is filled by the last one, so the active rows stay contiguous, and waiting sequences take the
free rows. It knows engines, samplers and text; nothing of bundles, templates or threads beyond the engine's lock.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .. import CapacityError, RequestError
from .engines import Engine, KvCache
from .sampler import SampledToken, Sampler, logprobs_of
from .sampling import SamplingParams
from .text import Detokenizer, StopStrings, special_ids

FinishReason = Literal["stop", "length", "capacity", "cancelled"]

_SCORING_CHUNK = 64  # tokens whose logits are held at once for prompt logprobs: 64 × V floats


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. prefill_s: from the start of prefill to the first sampled token. decode_s: from there to the last."""

    prefill_s: float
    decode_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens that were computed (not found in the cache) a second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first a second."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What one sequence became.

    token_ids: sampled tokens, a stop token at the end included; text: without it, without the stop string.
    finish_reason: `stop` (eos, stop id or stop string), `length` (max_tokens), `capacity` (the cache is full),
        `cancelled`.
    stop_reason: the stop string or stop id that ended it; None for eos.
    logprobs: one entry a token of token_ids if asked for. prompt_logprobs: one a prompt token, the first None.
    others: with n > 1, the samples after the first.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[SampledToken, ...] | None
    prompt_logprobs: tuple[SampledToken | None, ...] | None
    timings: Timings
    others: tuple["Completion", ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added to a sequence: text may be empty while a character or a possible stop string is open."""

    index: int
    text: str
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class GenerationSequence:
    """One sequence in flight; `cached` counts its tokens in the KV cache.

    group: shared by the n samples of one prompt, which prefill it once.
    """

    index: int
    prompt_ids: Sequence[int]
    params: SamplingParams
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopStrings
    group: "PromptGroup"
    cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    sampled: list[SampledToken] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reused: int = 0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def completion(self) -> Completion:
        """The result, once finish_reason is set."""
        assert self.finish_reason is not None
        timings = Timings(
            self.first_token - self.started,
            self.last_token - self.first_token,
            len(self.prompt_ids),
            self.reused,
            len(self.token_ids),
        )
        return Completion(
            self.text,
            tuple(self.token_ids),
            self.finish_reason,
            self.stop_reason,
            tuple(self.sampled) if self.params.logprobs is not None else None,
            tuple(self.group.prompt_logprobs) if self.params.prompt_logprobs is not None else None,
            timings,
        )


@dataclass(slots=True)
class PromptGroup:
    """The samples of one prompt: its last logits (V,) and its logprobs, kept while siblings wait for a row."""

    waiting: int = 0
    logits: NDArray[np.float32] | None = None
    prompt_logprobs: list[SampledToken | None] = field(default_factory=list)


class Generator:
    """Runs sequences on an engine.

    eos_token_ids end a sequence unless it ignores them.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._eos = frozenset(eos_token_ids)

    def prepare_one(self, prompt: Sequence[int], params: SamplingParams, *, cached: int = 0) -> GenerationSequence:
        """Make the sequence of one prompt with one sample.

        Args:
            prompt: token ids.
            params: n must be 1.
            cached: leading tokens of the prompt that row 0 of the cache already holds.

        Raises:
            RequestError, CapacityError: as of `prepare`.
        """
        if params.n != 1:
            raise RequestError("a stream or a session has one sample: n must be 1")
        (sequence,) = self.prepare([prompt], [params])
        sequence.cached = sequence.reused = cached
        return sequence

    def prepare(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[GenerationSequence]:
        """Make the sequences of some prompts, n a prompt, in order.

        Args:
            prompts: token ids of each prompt.
            params: one each.

        Raises:
            RequestError: an empty prompt, or an id outside the vocabulary.
            CapacityError: a prompt is longer than the capacity.
        """
        limits = self._engine.limits
        sequences: list[GenerationSequence] = []
        for prompt, wanted in zip(prompts, params, strict=True):
            if not prompt:
                raise RequestError("the prompt is empty")
            if not 0 <= min(prompt) <= max(prompt) < limits.vocab_size:
                raise RequestError(f"prompt token ids must lie in [0, {limits.vocab_size})")
            if len(prompt) > limits.capacity:
                raise CapacityError(
                    f"the prompt has {len(prompt)} tokens, the capacity of the engine is {limits.capacity}; "
                    "shorten it, or build with a larger --capacity"
                )
            group = PromptGroup(waiting=wanted.n)
            suppressed = set(wanted.stop_token_ids) | (set() if wanted.ignore_eos else self._eos)
            for sample in range(wanted.n):
                sampler = Sampler(wanted, prompt, limits.vocab_size, stop_token_ids=suppressed, index=sample)
                detokenizer = Detokenizer(self._tokenizer, self._special)
                stops = StopStrings(wanted.stop)
                sequences.append(GenerationSequence(len(sequences), prompt, wanted, sampler, detokenizer, stops, group))
        return sequences

    def run(
        self,
        sequences: Sequence[GenerationSequence],
        cache: KvCache,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Chunk]:
        """Run to the end, one chunk a sampled token; closing the iterator abandons what is unfinished.

        Args:
            sequences: from `prepare`; they are updated in place.
            cache: as many of them run at once as it has rows.
            cancelled: asked before every step; True ends every sequence with reason `cancelled`.
        """
        waiting = deque(sequences)
        active: list[GenerationSequence] = []  # by row
        step = _DecodeBuffers(cache.rows)
        while waiting or active:
            if cancelled():
                for sequence in (*active, *waiting):
                    yield self._finish(sequence, "cancelled", None, None)
                return
            if waiting and len(active) < cache.rows:
                sequence = waiting.popleft()
                chunk = self._start(sequence, cache, active)
                if sequence.finish_reason is None:
                    active.append(sequence)
                yield chunk
                continue
            chunks = self._decode(active, cache, step)
            for row in reversed(range(len(active))):
                if active[row].finish_reason is not None:
                    last = active.pop()
                    if row < len(active):
                        cache.copy_row(len(active), row, last.cached)
                        active[row] = last
            yield from chunks

    def _start(self, sequence: GenerationSequence, cache: KvCache, active: Sequence[GenerationSequence]) -> Chunk:
        """Prefill a sequence into the first free row, or copy its prompt from a sibling's, and sample."""
        sequence.started = time.perf_counter()
        row, group = len(active), sequence.group
        group.waiting -= 1
        sibling = next((r for r, other in enumerate(active) if other.group is group), None)
        if sibling is not None and group.logits is not None:
            cache.copy_row(sibling, row, len(sequence.prompt_ids))
            sequence.cached = sequence.reused = len(sequence.prompt_ids)
            chunk = self._accept(sequence, group.logits)
        else:
            with self._engine.lock:
                logits = self._prefill(sequence, cache, row)
                group.logits = logits.copy() if group.waiting else None
                chunk = self._accept(sequence, logits)
        if not group.waiting:
            group.logits = None
        return chunk

    def _prefill(self, sequence: GenerationSequence, cache: KvCache, row: int) -> NDArray[np.float32]:
        """Compute the prompt's tokens that the row does not hold yet; return the logits (V,) after the last."""
        prompt = np.asarray(sequence.prompt_ids, np.int64)
        scored = sequence.params.prompt_logprobs
        chunk = self._engine.limits.max_chunk
        if scored is not None:
            chunk = min(chunk, _SCORING_CHUNK)
            sequence.cached = sequence.reused = 0
            sequence.group.prompt_logprobs = [None]
        start = sequence.cached
        while True:
            ids = prompt[None, start : start + chunk]
            length = ids.shape[1]
            positions = np.arange(length)[None] if scored is not None else np.array([[length - 1]])
            offsets, lens = np.array([start], np.int32), np.array([length], np.int32)
            logits = self._engine.step(cache, row, ids, offsets, lens, positions)
            start += length
            if scored is not None:
                following = prompt[start - length + 1 : start + 1].tolist()
                sequence.group.prompt_logprobs += [
                    logprobs_of(logits[0, k], token, scored) for k, token in enumerate(following)
                ]
            if start == len(prompt):
                sequence.cached = start
                last: NDArray[np.float32] = logits[0, -1]
                return last

    def _decode(self, active: Sequence[GenerationSequence], cache: KvCache, step: "_DecodeBuffers") -> list[Chunk]:
        """Feed every active sequence its last token; sample the next."""
        batch = len(active)
        for row, sequence in enumerate(active):
            step.input_ids[row, 0] = sequence.token_ids[-1]
            step.offsets[row] = sequence.cached
        with self._engine.lock:
            logits = self._engine.step(
                cache, 0, step.input_ids[:batch], step.offsets[:batch], step.ones[:batch], step.zeros[:batch]
            )
            chunks = []
            for row, sequence in enumerate(active):
                sequence.cached += 1
                chunks.append(self._accept(sequence, logits[row, 0]))
        return chunks

    def _accept(self, sequence: GenerationSequence, logits: NDArray[np.float32]) -> Chunk:
        """Sample one token; append it, its text, and the reason to stop if there is one."""
        sampled = sequence.sampler.sample(logits)
        now = time.perf_counter()
        sequence.first_token = sequence.first_token or now
        sequence.last_token = now
        token, params = sampled.token_id, sequence.params
        sequence.token_ids.append(token)
        if params.logprobs is not None:
            sequence.sampled.append(sampled)
        if token in params.stop_token_ids:
            return self._finish(sequence, "stop", token, token)
        if token in self._eos and not params.ignore_eos:
            return self._finish(sequence, "stop", None, token)
        text = sequence.detokenizer.push(token)
        if len(sequence.token_ids) >= params.min_tokens:
            text, stop = sequence.stops.push(text)
            if stop is not None:
                sequence.text += text
                sequence.finish_reason, sequence.stop_reason = "stop", stop
                return Chunk(sequence.index, text, token, "stop")
        sequence.text += text
        if params.max_tokens is not None and len(sequence.token_ids) >= params.max_tokens:
            return self._finish(sequence, "length", None, token, text)
        if sequence.cached >= self._engine.limits.capacity:
            return self._finish(sequence, "capacity", None, token, text)
        return Chunk(sequence.index, text, token, None)

    def _finish(
        self,
        sequence: GenerationSequence,
        reason: FinishReason,
        stop_reason: str | int | None,
        token: int | None,
        text: str = "",
    ) -> Chunk:
        """Close a sequence; text that was held back comes out, but for a stop string that it completes."""
        tail, stop = sequence.stops.push(sequence.detokenizer.flush())
        if stop is None:
            tail += sequence.stops.flush()
        sequence.text += tail
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        return Chunk(sequence.index, text + tail, token, reason)


class _DecodeBuffers:
    """The inputs of decode steps, allocated once a run: one token a row."""

    def __init__(self, rows: int) -> None:
        self.input_ids = np.zeros((rows, 1), np.int64)
        self.offsets = np.zeros(rows, np.int32)
        self.ones = np.ones(rows, np.int32)
        self.zeros = np.zeros((rows, 1), np.int64)
