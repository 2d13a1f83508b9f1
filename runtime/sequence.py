"""What generation works on and what it gives: a sequence in flight, its chunks, and its completion with timings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .sampler import SampledToken, Sampler
from .sampling import SamplingParams
from .speculation import PromptLookup
from .text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "capacity", "cancelled"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. prefill_s: from the start of prefill to the first sampled token. decode_s: from there to the last.

    drafted_tokens: of speculation, and accepted_tokens: those of them that were what was sampled anyway.
    """

    prefill_s: float
    decode_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

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


@dataclass(slots=True)  # not frozen: there is one a token, and a frozen one takes three times as long to make
class Chunk:
    """What one token added to a sequence: text may be empty while a character or a possible stop string is open."""

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
    lookup: PromptLookup | None = None
    drafted: int = 0
    accepted: int = 0

    def completion(self) -> Completion:
        """The result, once finish_reason is set."""
        assert self.finish_reason is not None
        timings = Timings(
            self.first_token - self.started,
            self.last_token - self.first_token,
            len(self.prompt_ids),
            self.reused,
            len(self.token_ids),
            self.drafted,
            self.accepted,
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
