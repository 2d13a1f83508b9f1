"""What a request asks of the sampler: one validated value, `SamplingParams`."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import RequestError

LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32] | None]
"""(generated token ids, logits (V,) float32) -> the logits to use; None if they were changed in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Semantics are those of vLLM's V1 engine.

    A step works in this order, as vLLM's does: logprobs are taken from the model's own logits (raw); then logit_bias
    and the suppression of stop tokens before min_tokens; then repetition, frequency and presence penalties; then
    logits_processors; then, unless greedy, temperature, min_p, top_k, top_p, and a draw.

    temperature: divides the logits; 0 is greedy.
    top_k: keep the k largest logits (and ties with the k-th); 0 or -1 is off.
    top_p: keep the fewest tokens whose probabilities sum to top_p; 1 is off.
    min_p: drop tokens less likely than min_p times the likeliest; 0 is off.
    repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied.
    frequency_penalty, presence_penalty: subtracted per occurrence in the output, and once if there is any.
    logit_bias: token id -> number added to its logit.
    seed: same seed, same text; with n > 1 each sample has a stream of its own derived from it.
    stop: text that ends the output, itself left out. stop_token_ids: likewise tokens, kept in `token_ids`.
    ignore_eos: do not stop at the model's end token.
    max_tokens: None is as many as fit. min_tokens: no stop token or stop text counts before.
    n: samples of one prompt. logprobs: report this many likeliest tokens a step besides the sampled one.
    prompt_logprobs: the same of each prompt token.
    logits_processors: called in turn with (generated ids, logits (V,)); see `LogitsProcessor`.

    Raises:
        RequestError: a value of the wrong type or outside its range, or options that contradict each other.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        """Check every field, then their combinations."""
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("top_k", self.top_k, -1)
        _integer("min_tokens", self.min_tokens, 0)
        _integer("n", self.n, 1)
        for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1 if name == "max_tokens" else 0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be true or false, found {self.ignore_eos!r}")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number(f"logit_bias[{token}]", bias)
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise RequestError("top_p and repetition_penalty must be greater than 0")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.temperature == 0:
            filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
            useless = [name for name, on in filters.items() if on]
            if useless:
                raise RequestError(f"temperature 0 is greedy, so {', '.join(useless)} would have no effect; drop one")
            if self.n > 1:
                raise RequestError("temperature 0 is greedy, so n must be 1: the samples would be the same")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one; an unknown name is a `RequestError`."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """From a mapping of field names; an unknown one is a `RequestError` that suggests the nearest."""
        _known(options)
        return cls(**options)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """The defaults that a checkpoint's generation_config.json asks for; greedy unless it says `do_sample`."""
        names = ["repetition_penalty"]
        given = {"temperature": 0.0}
        if config.get("do_sample"):
            names += ["temperature", "top_k", "top_p", "min_p"]
            given = {}
        return cls(**given | {name: config[name] for name in names if config.get(name) is not None})


def _known(options: Mapping[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise RequestError(f"unknown sampling option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be a finite number in [{low}, {high}], found {value!r}")


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise RequestError(f"{name} must be an integer of at least {low}, found {value!r}")


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RequestError(f"a stop string must be a text that is not empty, found {text!r}")
    return stops
