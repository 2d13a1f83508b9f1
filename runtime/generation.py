"""The generation loop: sequences in, sampled tokens and text out, over the rows of one KV cache.

A sequence is prefilled alone, chunk by chunk and without padding; then all sequences decode together, one token a
step, or a few more where speculation drafts them. A finished row is filled by the last one, so the active rows stay
contiguous, and waiting sequences take the free rows. It knows engines, samplers and text; nothing of bundles, templates
or threads beyond the engine's lock.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .. import CapacityError, RequestError
from .engines import Engine, KvCache
from .sampler import SampledToken, Sampler, logprobs_of, sample_rows
from .sampling import SamplingParams
from .sequence import Chunk, FinishReason, GenerationSequence, PromptGroup
from .speculation import LENGTHS, PromptLookup, StepCosts, choose_length
from .text import Detokenizer, StopStrings, TokenTexts

_SCORING_CHUNK = 64  # tokens whose logits are held at once for prompt logprobs: 64 × V floats


class Generator:
    """Runs sequences on an engine.

    eos_token_ids end a sequence unless it ignores them. speculates: whether steps draft and verify tokens ahead.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self.speculates = False
        self._engine = engine
        self._texts = TokenTexts(tokenizer)
        self._eos = frozenset(eos_token_ids)
        self._costs = StepCosts()

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
                detokenizer = Detokenizer(self._texts)
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
        steps: dict[tuple[int, int], _StepInputs] = {}  # by rows and tokens a row
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
            chunks = self._decode(active, cache, steps)
            for row in range(len(active) - 1, -1, -1):
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
            chunk = self._accept(sequence, sequence.sampler.sample(group.logits))
        else:
            with self._engine.lock:
                logits = self._prefill(sequence, cache, row)
                group.logits = logits.copy() if group.waiting else None
                chunk = self._accept(sequence, sequence.sampler.sample(logits))
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

    def _decode(
        self, active: Sequence[GenerationSequence], cache: KvCache, steps: "dict[tuple[int, int], _StepInputs]"
    ) -> list[Chunk]:
        """Feed every active sequence its last token, and drafts if they promise to pay; sample what follows."""
        length = self._draft_length(active) if self.speculates else 1
        shape = (len(active), length)
        step = steps.get(shape) or steps.setdefault(shape, _StepInputs(*shape))
        drafts: list[list[int]] = []
        for row, sequence in enumerate(active):
            step.first_ids[row] = sequence.token_ids[-1]
            step.offsets[row] = sequence.cached
            if length > 1:
                drafts.append(self._draft(sequence, length - 1))
                step.lay_out(row, drafts[row])
        with self._engine.lock:
            started = time.perf_counter()
            logits = self._engine.step(cache, 0, step.input_ids, step.offsets, step.lens, step.positions)
            if self.speculates:
                self._costs.record(*shape, time.perf_counter() - started)
            if length > 1:
                return [c for row, one in enumerate(active) for c in self._verify(one, drafts[row], logits[row])]
            sampled = step.sample(active, logits)
        chunks = []
        for sequence, token in zip(active, sampled, strict=True):
            sequence.cached += 1
            chunks.append(self._accept(sequence, token))
        return chunks

    def _verify(
        self, sequence: GenerationSequence, draft: Sequence[int], logits: NDArray[np.float32]
    ) -> Iterator[Chunk]:
        """Sample token by token from logits (1 + drafts, V), as long as the drafts are what is sampled.

        A token is sampled after all that is before it, as without drafts. The keys and values of rejected drafts lie
        beyond `cached`, where the next step writes.
        """
        sequence.drafted += len(draft)
        for position in range(len(draft) + 1):
            sequence.cached += 1
            chunk = self._accept(sequence, sequence.sampler.sample(logits[position]))
            right = position < len(draft) and chunk.token_id == draft[position]
            sequence.accepted += right
            yield chunk
            if not right or sequence.finish_reason is not None:
                return

    def _draft_length(self, active: Sequence[GenerationSequence]) -> int:
        """Tokens a row of the next step, of `LENGTHS` or 1."""
        odds = []
        for sequence in active:
            if sequence.lookup is None:
                sequence.lookup = PromptLookup([*sequence.prompt_ids, *sequence.token_ids])
            odds.append(sequence.lookup.odds(self._room(sequence)))
        return choose_length(odds, self._costs, self._engine.limits.max_chunk)

    def _draft(self, sequence: GenerationSequence, longest: int) -> list[int]:
        assert sequence.lookup is not None
        return sequence.lookup.draft(min(longest, self._room(sequence)))

    def _room(self, sequence: GenerationSequence) -> int:
        """How many drafts can be of use: they must fit the cache, and the token after them is sampled too."""
        room = min(LENGTHS[-1], self._engine.limits.capacity - sequence.cached) - 1
        if sequence.params.max_tokens is not None:
            room = min(room, sequence.params.max_tokens - len(sequence.token_ids) - 1)
        return room

    def _accept(self, sequence: GenerationSequence, sampled: SampledToken) -> Chunk:
        """Append a sampled token, its text, and the reason to stop if there is one."""
        now = time.perf_counter()
        sequence.first_token = sequence.first_token or now
        sequence.last_token = now
        token, params = sampled.token_id, sequence.params
        sequence.token_ids.append(token)
        if sequence.lookup is not None:
            sequence.lookup.push(token)
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


class _StepInputs:
    """The inputs of decode steps of one shape, allocated once a run: S tokens a row, of which all are asked for logits.

    Set for one token a row; with drafts `lay_out` says how many of them a row has. Logits beyond them mean nothing.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.input_ids = np.zeros((rows, length), np.int64)
        self.first_ids = self.input_ids[:, 0]
        self.offsets = np.zeros(rows, np.int32)
        self.lens = np.ones(rows, np.int32)
        self.positions = np.arange(length)[None].repeat(rows, 0)
        self._logits: NDArray[np.float32] | None = None
        self._rows: list[NDArray[np.float32]] = []

    def lay_out(self, row: int, draft: Sequence[int]) -> None:
        """Put a draft behind a row's first token."""
        self.input_ids[row, 1 : 1 + len(draft)] = draft
        self.lens[row] = 1 + len(draft)

    def sample(self, active: Sequence[GenerationSequence], logits: NDArray[np.float32]) -> list[SampledToken]:
        """A token for each row from logits (B, 1, V), which an engine returns in one buffer step after step."""
        if logits is not self._logits:
            self._logits, self._rows = logits, list(logits[:, 0])
        if len(active) == 1:
            return [active[0].sampler.sample(self._rows[0])]
        return sample_rows([sequence.sampler for sequence in active], logits[:, 0])
