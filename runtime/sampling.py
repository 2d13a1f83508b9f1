"""What a request asks of the sampler: one validated value, `SamplingParams`.

It knows ranges and contradictions; nothing of logits, tokenizers or engines.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import RequestError

LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32] | None]
"""(generated token ids, logits (V,) float32) -> the logits to use; None if they were changed in place."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOWEST_TEMPERATURE = 1e-5  # below it vLLM is greedy without saying so
_HIGHEST_TEMPERATURE = 1e5  # every distribution is uniform long before; beyond float32, -inf / temperature is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Semantics are those of vLLM's V1 engine.

    A step works in this order, as vLLM's does (vllm/v1/sample/sampler.py): logprobs are taken from the model's own
    logits (raw: a log-softmax before anything below); then logit_bias and the suppression of stop tokens before
    min_tokens; then repetition, frequency and presence penalties; then logits_processors; then, unless greedy,
    temperature, min_p, top_k, top_p, and a draw from what is left, renormalised.

    temperature: divides the logits; 0 is greedy.
    top_k: keep the k largest logits (and ties with the k-th); 0 or -1 is off, stored as 0.
    top_p: keep the fewest likeliest tokens whose probabilities sum to top_p (of ties the lower id first); 1 is off.
    min_p: drop tokens less likely than min_p times the likeliest; 0 is off.
    repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied.
    frequency_penalty, presence_penalty: subtracted per occurrence in the output, and once if there is any.
    logit_bias: token id -> number added to its logit.
    seed: same seed, same text; with n > 1 each sample has a stream of its own derived from it. None is fresh entropy.
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
        """Check every field and take copies of what is mutable, then check the combinations."""
        _number("temperature", self.temperature, 0.0, _HIGHEST_TEMPERATURE)
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
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, found {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            _integer("a token id of logit_bias", token, 0)
            _number(f"logit_bias[{token}]", bias)
        stops = (self.stop,) if isinstance(self.stop, str) else _entries("stop", self.stop)
        for text in stops:
            if not isinstance(text, str) or not text:
                raise RequestError(f"a stop string must be a text that is not empty, found {text!r}")
        stop_token_ids = _entries("stop_token_ids", self.stop_token_ids)
        for token in stop_token_ids:
            _integer("a token id of stop_token_ids", token, 0)
        processors = _entries("logits_processors", self.logits_processors)
        for process in processors:
            if not callable(process):
                raise RequestError(f"a logits processor must be a function, found {process!r}")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "logits_processors", processors)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise RequestError("top_p and repetition_penalty must be greater than 0; 1 turns them off")
        if self.temperature == 0:
            filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
            useless = [name for name, on in filters.items() if on]
            if useless:
                raise RequestError(f"temperature 0 is greedy, so {', '.join(useless)} would have no effect; drop one")
            if self.n > 1:
                raise RequestError("temperature 0 is greedy, so n must be 1: the samples would be the same")
        elif self.temperature < _LOWEST_TEMPERATURE:
            raise RequestError(
                f"temperature {self.temperature} is too small to divide by; use 0 for greedy, "
                f"or at least {_LOWEST_TEMPERATURE}"
            )
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
        """The defaults that a checkpoint's generation_config.json asks for; greedy unless it says `do_sample`.

        Reads temperature, top_k, top_p, min_p and repetition_penalty, and as vLLM does no other key. One that is
        absent or null is off, as in vLLM.

        Raises:
            RequestError: a value of the wrong type or outside its range.
        """
        names = ["repetition_penalty"]
        given = {"temperature": 0.0}
        if config.get("do_sample"):
            names += ["temperature", "top_k", "top_p", "min_p"]
            given = {}
        try:
            return cls(**given | {name: config[name] for name in names if config.get(name) is not None})
        except RequestError as error:
            raise RequestError(f"generation_config.json: {error}") from error


def _known(options: Mapping[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            raise RequestError(f"unknown sampling option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _number(name: str, value: object, low: float = -_FLOAT32_MAX, high: float = _FLOAT32_MAX) -> None:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be a number in [{low:g}, {high:g}], found {value!r}")


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise RequestError(f"{name} must be an integer of at least {low}, found {value!r}")


def _entries(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, found {value!r}")
    return tuple(value)
