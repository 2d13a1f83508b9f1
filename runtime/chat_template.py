"""Chat templates: from messages to the text a model was trained on, in Jinja, without trusting the template.

A template comes with a checkpoint, so it is foreign code. It runs in Jinja's immutable sandbox, and a budget of
executed lines, time, output and memory growth ends it: a template cannot reach Python, change what it is given,
or run for ever.
"""

import datetime
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .. import ChatTemplateError, RequestError

_MAX_LINES = 2_000_000  # template lines executed; a long conversation takes some thousands
_MAX_SECONDS = 2.0
_MAX_CHARACTERS = 16 << 20
_MAX_GROWTH_KB = 256 << 10  # of the process's peak memory while a template runs
_MAX_REPEAT = 1 << 20  # elements that one multiplication or padding may make
_MAX_INTEGER = 1 << 512
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"}


class ChatTemplate:
    """A compiled template.

    Thread safety: may be rendered from any thread.
    """

    def __init__(self, source: str, **special_tokens: str) -> None:
        """Compile.

        Args:
            source: Jinja, as in `chat_template.jinja`.
            special_tokens: variables such as bos_token and eos_token.

        Raises:
            ChatTemplateError: a syntax error.
        """
        self._special_tokens = special_tokens
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        for name in ("center", "indent", "wordwrap", "format"):
            del environment.filters[name]
        environment.filters["indent"] = _indent
        environment.globals = {
            "range": _range,
            "namespace": environment.globals["namespace"],
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: each with a `role`, usually a `content`.
            add_generation_prompt: end where the assistant is to speak.
            tools: JSON schemas of functions, for templates that know them.
            variables: more of what this template asks for.

        Raises:
            RequestError: messages are empty or have no role.
            ChatTemplateError: the template refuses them, fails, or exceeds its budget.
        """
        if not messages:
            raise RequestError("the conversation is empty")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"a message needs a role: {message!r}")
        parts: list[str] = []
        try:
            with _budget() as check:
                for part in self._template.generate(
                    messages=list(messages),
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                    **variables,
                ):
                    parts.append(part)
                    check(len(part))
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may raise whatever Python can
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, closed further: no way to make large values in one operation."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Bound what one operation can make."""
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse text methods that pad to any width or format."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _PADDING)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which templates mark the assistant's words: renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    sizes = [len(side) if hasattr(side, "__len__") else None for side in (left, right)]
    if operator == "%" and isinstance(left, (str, bytes)):
        raise ChatTemplateError("the chat template formats with %, which is not allowed")
    if operator == "+" and None not in sizes and sum(s for s in sizes if s) > _MAX_CHARACTERS:
        raise ChatTemplateError("the chat template makes a value that is too large")
    if operator == "*" and sizes != [None, None]:
        size, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
        if isinstance(times, int) and size is not None and size * times > _MAX_REPEAT:
            raise ChatTemplateError("the chat template repeats a value too often")
    integers = [side for side in (left, right) if isinstance(side, int)]
    if operator in ("*", "**") and any(abs(i) > _MAX_INTEGER for i in integers):
        raise ChatTemplateError("the chat template computes with numbers that are too large")
    if operator == "**" and len(integers) == 2 and abs(right) > 64:
        raise ChatTemplateError("the chat template computes with numbers that are too large")


@contextmanager
def _budget() -> Iterator[Callable[[int], None]]:
    """Count what the block executes in this thread's templates; yields a function that counts output."""
    started, lines, characters = time.monotonic(), 0, 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check(written: int) -> None:
        nonlocal characters
        characters += written
        if characters > _MAX_CHARACTERS:
            raise ChatTemplateError("the chat template writes without end")
        if lines > _MAX_LINES or time.monotonic() - started > _MAX_SECONDS:
            raise ChatTemplateError("the chat template does not come to an end")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory > _MAX_GROWTH_KB:
            raise ChatTemplateError("the chat template takes too much memory")

    def trace(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001
        nonlocal lines
        if event == "line":
            lines += 1
            check(0)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield check
    finally:
        sys.settrace(before)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as HF's templates expect it: not escaped for HTML, other scripts as they are."""
    if indent is not None and not 0 <= indent <= 16:
        raise ChatTemplateError("the chat template indents too far")
    allowed = {k: v for k, v in options.items() if k in ("ensure_ascii", "separators", "sort_keys")}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **allowed})


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if len(str(width)) > 100 or (isinstance(width, int) and not 0 <= width <= 100):
        raise ChatTemplateError("the chat template indents too far")
    return jinja2.filters.do_indent(text, width, first, blank)


def _range(*arguments: int) -> range:
    result = range(*arguments)
    if len(result) > 100_000:
        raise ChatTemplateError("the chat template asks for a range that is too long")
    return result


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses this conversation: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
