"""The Pipeline: a loaded model that turns prompts into text.

It owns an engine, a tokenizer and a chat template, and gives every call KV rows of its own.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from tokenizers import Tokenizer

from .. import ChatTemplateError, RequestError
from .bundle import Bundle
from .chat_template import ChatTemplate
from .engines import Engine, KvCache
from .generation import Generator
from .sampling import SamplingParams
from .sequence import Chunk, Completion, GenerationSequence

if TYPE_CHECKING:
    from .session import Session

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class Pipeline:
    """Generates text with one engine.

    Thread safety: every method may be called from any thread at any time. Calls interleave step by step; each has
    its own rows, so they do not see each other. A `Session` belongs to one conversation, one call at a time.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        template: ChatTemplate | None = None,
        default_params: SamplingParams | None = None,
        bundle: Bundle | None = None,
        target: str = "",
        passed_over: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap loaded parts; `Pipeline.load` is the usual way.

        Args:
            engine: closed with the pipeline.
            tokenizer: of the model.
            eos_token_ids: tokens that end a sequence.
            template: for `chat`; without one `chat` is refused.
            default_params: what calls without parameters use; greedy if None.
            bundle: where it all came from.
            target: which target of the bundle runs.
            passed_over: better targets that cannot run here -> why.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.default_params = default_params or SamplingParams(temperature=0.0)
        self.bundle = bundle
        self.target = target
        self.passed_over = dict(passed_over or {})
        self._generator = Generator(engine, tokenizer, eos_token_ids)
        self._free: list[KvCache] = []
        self._free_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        target: str | None = None,
        verify: Literal["quick", "full", True] = "quick",
        threads: int | None = None,
        capacity: int | None = None,
        max_batch: int | None = None,
        speculate: str | None = None,
    ) -> "Pipeline":
        """Open a bundle and load the best target that this host can run.

        Args:
            path: the bundle's directory.
            target: force one (`onnxruntime`, `tensorrt-rtx`, …), proven or not; `onnxruntime-cuda` runs the universal
                graph by ONNX Runtime's CUDA provider.
            verify: `quick` hashes every file but the weights, `full` the weights too. True is `quick`, and then the
                engine is held to the bundle's golden data on one prompt, which takes about a second; the whole proof
                is `zonda verify`.
            threads: compute threads; None is one a physical core.
            capacity: serve fewer cached tokens a row than the bundle allows.
            max_batch: serve fewer rows at once than the bundle allows.
            speculate: `ngram` drafts tokens from what the prompt and the output said before and verifies several in a
                step, where that is faster. It changes no text, so it is the pipeline's matter and not that of
                `SamplingParams`; the attribute of that name may be set at any time.

        Raises:
            BundleError: the bundle is missing, altered or malformed.
            TargetUnavailableError: no target can run here; the message says why, one line a target.
            ParityError: with verify=True, the engine computes something else than the build recorded.
            RequestError: capacity or max_batch is more than the bundle was built for, or an unknown way to speculate.
        """
        from .loader import load_pipeline

        _check_speculation(speculate)
        pipeline = load_pipeline(
            path, target=target, verify=verify, threads=threads, capacity=capacity, max_batch=max_batch
        )
        pipeline.speculate = speculate
        return pipeline

    @property
    def speculate(self) -> str | None:
        """How tokens are drafted: `ngram`, or None for not at all. Setting it is for the steps to come."""
        return "ngram" if self._generator.speculates else None

    @speculate.setter
    def speculate(self, way: str | None) -> None:
        _check_speculation(way)
        self._generator.speculates = way is not None

    @overload
    def generate(
        self, prompt: str, params: SamplingParams | None = None, *, cancelled: Callable[[], bool] | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion | list[Completion]:
        """Complete one prompt, or a batch of prompts of any lengths.

        Args:
            prompt: text or token ids; a list of either is a batch.
            params: for all, or one a prompt; None is `default_params`.
            cancelled: asked before every step; True ends the call with what there is.

        Returns:
            One `Completion` a prompt, in order; a single one for a single prompt.

        Raises:
            RequestError: an empty or malformed prompt.
            CapacityError: a prompt is longer than the capacity.
        """
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts = [prompt] if single else list(prompt)
        if not prompts:
            raise RequestError("the prompt is empty")
        wanted = [params or self.default_params] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(wanted) != len(prompts):
            raise RequestError(f"{len(wanted)} sets of parameters for {len(prompts)} prompts")
        sequences = self._generator.prepare([self.encode(p) for p in prompts], wanted)
        with self._rows(len(sequences)) as cache:
            for _ in self._generator.run(sequences, cache, cancelled or (lambda: False)):
                pass
        results, rest = [], iter(sequences)
        for one in wanted:
            first, *others = (next(rest).completion() for _ in range(one.n))
            results.append(replace(first, others=tuple(others)) if others else first)
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[Chunk]:
        """Complete one prompt, yielding a `Chunk` a token; close the iterator to stop early.

        Args and errors: as of `generate`; n must be 1.
        """
        sequence = self._generator.prepare_one(self.encode(prompt), params or self.default_params)
        return self._stream(sequence, cancelled or (lambda: False))

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion:
        """Answer a conversation: a list of `{"role": …, "content": …}`, or one user message as text.

        Raises:
            ChatTemplateError: the bundle has no chat template, or it refuses the messages.
        """
        return self.generate(self.encode(self.render(messages), special_tokens=False), params, cancelled=cancelled)

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Chunk]:
        """`chat`, streamed."""
        return self.stream(self.encode(self.render(messages), special_tokens=False), params, cancelled=cancelled)

    def session(self) -> "Session":
        """A conversation that keeps its KV cache between turns."""
        from .session import Session

        return Session(self, self._generator)

    def render(self, messages: str | Sequence[Message]) -> str:
        """The text of a conversation as the model's chat template writes it, ready for the assistant's turn."""
        if self.template is None:
            raise ChatTemplateError("the bundle has no chat template; use generate with a prompt you format yourself")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.template.render(messages)

    def encode(self, prompt: Prompt, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text (with the tokenizer's own special tokens), or a list of ids as it is.

        Raises:
            RequestError: the prompt is empty, or neither text nor integers.
        """
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=special_tokens).ids if prompt else []
        else:
            ids = list(prompt)
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise RequestError("a prompt is text or a list of token ids")
        if not ids:
            raise RequestError("the prompt is empty")
        return ids

    def close(self) -> None:
        """Release the engine."""
        self._free.clear()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, sequence: GenerationSequence, cancelled: Callable[[], bool]) -> Iterator[Chunk]:
        with self._rows(1) as cache:
            yield from self._generator.run([sequence], cache, cancelled)

    @contextmanager
    def _rows(self, wanted: int) -> Iterator[KvCache]:
        """KV rows for one call, taken from those that earlier calls gave back; stale tokens in them are never read."""
        rows = min(wanted, self.engine.limits.max_batch)
        with self._free_lock:
            fitting = [cache for cache in self._free if cache.rows >= rows]
            cache = min(fitting, key=lambda c: c.rows) if fitting else None
            if cache is not None:
                self._free.remove(cache)
        if cache is None:
            cache = self.engine.allocate(rows)
        try:
            yield cache
        finally:
            with self._free_lock:
                self._free.append(cache)


def _check_speculation(way: str | None) -> None:
    if way not in (None, "ngram"):
        raise RequestError(f"speculate must be 'ngram' or None, found {way!r}")
