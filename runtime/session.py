"""A conversation: its turns share one row of KV cache, so the history is not prefilled again."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .generation import Generator
from .sampling import SamplingParams
from .sequence import Chunk, Completion, GenerationSequence

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Session:
    """Keeps messages, their tokens and their KV cache between turns.

    What is reused is the longest common prefix of the tokens in the cache and of the new prompt, so a template that
    rewrites history costs time, never correctness. One call at a time.
    """

    def __init__(self, pipeline: "Pipeline", generator: Generator) -> None:
        self._pipeline = pipeline
        self._generator = generator
        self._cache = pipeline.engine.allocate(1)
        self._tokens: list[int] = []  # in the cache
        self._text = ""  # what those tokens and the last sampled one say
        self._spoken: list[int] = []  # the tokens of _text
        self.messages: list[dict[str, Any]] = []
        self.last: Completion | None = None

    def chat(
        self,
        message: str,
        params: SamplingParams | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion:
        """Say something as the user; the answer joins the history.

        Raises:
            ChatTemplateError: the bundle has no chat template, or it refuses the messages.
            CapacityError: the conversation no longer fits; start a new session.
        """
        for _ in self.stream(message, params, cancelled=cancelled):
            pass
        assert self.last is not None
        return self.last

    def stream(
        self,
        message: str,
        params: SamplingParams | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Chunk]:
        """`chat`, streamed; the turn joins the history when the iterator is exhausted, with what was said if closed."""
        conversation = [*self.messages, {"role": "user", "content": message}]
        text = self._pipeline.render(conversation)
        prompt = self._encode(text)
        cached = _common_prefix(self._tokens, prompt[:-1])
        params = params or self._pipeline.default_params
        sequence = self._generator.prepare_one(prompt, params, cached=cached)
        return self._stream(conversation, text, sequence, cancelled or (lambda: False))

    def _stream(
        self,
        conversation: list[dict[str, Any]],
        text: str,
        sequence: GenerationSequence,
        cancelled: Callable[[], bool],
    ) -> Iterator[Chunk]:
        try:
            yield from self._generator.run([sequence], self._cache, cancelled)
        finally:
            everything = [*sequence.prompt_ids, *sequence.token_ids]
            self._tokens = everything[: sequence.cached]
            if sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
            ended = sequence.finish_reason == "stop" and sequence.stop_reason is None
            self._spoken = everything[:-1] if ended else everything
            self._text = text + sequence.text
            self.messages = [*conversation, {"role": "assistant", "content": sequence.text}]
            self.last = sequence.completion()

    def _encode(self, text: str) -> list[int]:
        """Token ids of the rendered conversation; known text keeps the tokens that the model itself chose."""
        if self._text and text.startswith(self._text):
            rest = text[len(self._text) :]
            return [*self._spoken, *(self._pipeline.encode(rest, special_tokens=False) if rest else [])]
        return self._pipeline.encode(text, special_tokens=False)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
