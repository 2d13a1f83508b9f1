"""The sandbox that chat templates run in: Jinja that cannot reach Python, run for ever, or fill the memory.

A template comes with a checkpoint, so it is foreign code. It sees plain JSON values only, runs in Jinja's immutable
sandbox, and every way in which a value can grow is bounded before it grows; what
it may call is in `template_functions.py`. Knows nothing of messages or models.
"""

import functools
import json
import os
import re
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinMethodType, CodeType, FrameType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, Namespace

from .. import ChatTemplateError, RequestError
from . import template_functions as functions

_FILENAME = "<chat template>"
_OWN_FILES = (_FILENAME, __file__, functions.__file__)
_OWN_FOLDERS = tuple(folder + os.sep for module in (jinja2, json) for folder in module.__path__)
_MAX_SECONDS = 2.0
_MAX_EVENTS = 2_000_000  # template lines executed and functions called; a long conversation takes some thousands
_MAX_SIZE = 4 << 20  # characters and elements of one value, besides four times the input
_MAX_MADE = 64 << 20  # characters and elements of all values that a template makes, besides 64 times the input
_MAX_DEPTH = 100  # lists within lists; Python itself dies of hashing tuples that are nested a hundred thousand deep
_MAX_BITS = 4096  # of an integer
_FILTERS = """
    abs batch capitalize count d default dictsort e escape first float format groupby indent int items join
    last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice
    sort string sum title tojson trim truncate unique upper wordcount
"""
_TEXT_METHODS = """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_QUADRATIC = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"})
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
_CONTAINERS: tuple[type, ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
_CONVERSION = re.compile(r"%%|%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


def compile_template(source: str) -> CodeType:
    """Compile a template; it may then be rendered from any thread.

    Raises:
        Exception: what Jinja says of its syntax, and Python's compiler of absurd nesting.
    """
    return Sandbox().compile(source, filename=_FILENAME)


def render_template(code: CodeType, given: Mapping[str, Any]) -> str:
    """Render a compiled template in a sandbox of its own.

    Args:
        code: from `compile_template`.
        given: the template's variables, from `plain`.

    Raises:
        ChatTemplateError: it reaches for what it may not have, or exceeds its budget.
        Exception: whatever else a template can raise.
    """
    sandbox = Sandbox(given)
    template = jinja2.Template.from_code(sandbox, code, sandbox.globals)
    with _deadline():
        return template.render(given)


class _Generator(CodeGenerator):
    """Compiles literals and `~` so that what they make is weighed."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._weighed(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._weighed(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._weighed(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _weighed(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.weigh(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which templates mark the assistant's words: renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's, without names that Python or Jinja would take for more than data (`__class__`, `jinja_pass_arg`)."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, *rest = arguments
        Namespace.__init__(self)
        for name, value in functions.dict_(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith(("_", "jinja")) or name in ("unsafe_callable", "alters_data"):
            raise ChatTemplateError(f"the chat template may not store {name!r} in a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox for one rendering, closed further: no Python internals, and no value grows beyond bounds.

    The weight of a value is the number of characters and elements that it has when written out, shared parts counted
    each time: lists of one list twice, forty levels deep, are small in memory and 2⁴⁰ to compare, print or hash.
    What takes a time that is quadratic in the lengths of its operands happens inside C, where no budget of lines can
    end it, so one of the lengths is bounded.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(["*", "**", "%", "+", "-"])

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            finalize=_weigh_output,
            extensions=[_Generation, loopcontrols],
        )
        self.concat = self._concatenate  # type: ignore[method-assign]
        own = {
            "batch": functions.batch,
            "format": self._format_filter,
            "indent": functions.indent,
            "join": self._join_filter,
            "replace": self._replace,
            "round": functions.round_,
            "sum": functions.sum_,
            "tojson": self._tojson,
            "trim": functions.trim,
        }
        self.filters = {name: self._weighing(own.get(name, FILTERS[name])) for name in _FILTERS.split()}
        self.globals = {
            "range": functions.range_,
            "namespace": _Namespace,
            "dict": functions.dict_,
            "joiner": Joiner,
            "raise_exception": functions.raise_exception,
            "strftime_now": functions.strftime_now,
        }
        self._measures: dict[int, tuple[object, int, int]] = {}  # the object is kept, so that its id stays its own
        self._made, self._largest = 0, sys.maxsize
        size = self._weight(given) if given else 0
        self._largest, self._most = _MAX_SIZE + 4 * size, _MAX_MADE + 64 * size

    def weigh(self, value: Any) -> Any:
        """The value itself, charged to the budget.

        Raises:
            ChatTemplateError: it is too large, or all values together are.
        """
        self._require(self._weight(value))
        if isinstance(value, str) or _holds_values(value):
            self._made += len(value) + 1
            if self._made > self._most:
                raise ChatTemplateError("the chat template makes too many large values")
        return value

    def _weight(self, value: Any) -> int:
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Weight and depth; refuses what is too large or too deep as soon as that is known."""
        if isinstance(value, (MethodType, BuiltinMethodType)):
            value = value.__self__  # which a method may print
        if isinstance(value, str):
            return len(value) + 1, 0
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise ChatTemplateError("the chat template computes with numbers that are too large")
        if not _holds_values(value):
            return 1, 0
        known = self._measures.get(id(value))
        if known is None:
            weight, depth = 1, 0
            for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
                part_weight, part_depth = self._measure(part)
                weight, depth = weight + part_weight, max(depth, part_depth)
                self._require(weight)
            if depth >= _MAX_DEPTH:
                raise ChatTemplateError("the chat template nests values too deep")
            known = self._measures[id(value)] = value, weight, depth + 1
        return known[1:]

    def _require(self, size: int) -> None:
        if size > self._largest:
            raise ChatTemplateError("the chat template makes a value that is too large")

    def join(self, parts: Iterable[Any], separator: str = "") -> str:
        """The parts as one text."""
        texts = [str(part) for part in parts]
        self._require(sum(map(len, texts)) + len(separator) * len(texts))
        joined: str = self.weigh(separator.join(texts))
        return joined

    def _concatenate(self, parts: Iterable[str]) -> str:
        """Join what was written, as Jinja does at the end of a template, macro or block."""
        texts: list[str] = []
        size = 0
        for part in parts:
            texts.append(part)
            size += len(part)
            self._require(size)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Bound what one operation can make."""
        if operator == "%" and isinstance(left, str):
            return self.weigh(self._percent(left, right))
        if operator == "-" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise ChatTemplateError("the chat template subtracts what are not numbers")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    self._require(self._weight(value) * times)
        if operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise ChatTemplateError("the chat template computes with numbers that are too large")
        return self.weigh(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Weigh what goes in and what comes out."""
        self._require(sum(map(self._weight, (*arguments, *named.values()))))
        return self.weigh(super().call(context, function, *arguments, **named))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow the methods of JSON values that read, and what Jinja's own loops and namespaces have."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        own = isinstance(obj, (LoopContext, Macro, Namespace, TemplateReference))
        return own and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once, where Jinja would give an undefined value."""
        raise ChatTemplateError(f"the chat template may not use {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Stand in for the methods of a text that make more than they are given, or take too long."""
        if not isinstance(value, (MethodType, BuiltinMethodType)) or not isinstance(value.__self__, str):
            return None
        text, name = str(value.__self__), value.__name__
        if name == "join":
            return lambda parts: self.join(parts, text)
        if name == "replace":
            return lambda *arguments: self._replace(text, *arguments)
        if name in _QUADRATIC:
            return lambda *given, **named: value(
                *map(functions.require_short, given), **{k: functions.require_short(v) for k, v in named.items()}
            )
        formatter = super().wrap_str_format(value)
        return None if formatter is None else lambda *given, **named: self._format(text, formatter, *given, **named)

    def _weighing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its result weighed; what Jinja notes on a function is kept."""

        @functools.wraps(function)
        def weighed(*arguments: Any, **named: Any) -> Any:
            return self.weigh(function(*arguments, **named))

        return weighed

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        return self.join(value if attribute is None else map(make_attrgetter(self, attribute), value), str(d))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._require(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _format_filter(self, form: Any, *arguments: Any, **named: Any) -> str:
        return self._percent(str(form), named or arguments)

    def _percent(self, form: str, values: Any) -> str:
        functions.require_format(form)
        for width in (width for widths in _CONVERSION.findall(form) for width in widths if width):
            functions.require_padding(width)
        self._require(len(form) + form.count("%") * self._weight(values))
        text: str = form % values
        return text

    def _format(self, text: str, formatter: Callable[..., str], *arguments: Any, **named: Any) -> str:
        functions.require_format(text)
        fields = [spec for _, _, spec, _ in string.Formatter().parse(text) if spec is not None]
        for width in re.findall(r"[{]|\d+", " ".join(fields)):
            functions.require_padding(width)
        self._require(len(text) + len(fields) * sum(map(self._weight, (*arguments, *named.values()))))
        return formatter(*arguments, **named)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as HF's templates expect it: not escaped for HTML, other scripts as they are."""
        functions.require_padding(0 if indent is None else indent)
        functions.require_padding(sum(map(len, separators or ())))
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return encoder.encode(value) if indent is None else self._concatenate(encoder.iterencode(value))


@jinja2.pass_context
def _weigh_output(context: Context, value: Any) -> Any:
    sandbox: Sandbox = context.environment  # type: ignore[assignment]
    return sandbox.weigh(value)


@contextmanager
def _deadline() -> Iterator[None]:
    """Count what the block executes in this thread, and end it when it is too much or takes too long.

    Any Python function may be called in between: what the garbage collector runs (finalisers, `gc.callbacks`) is. An
    exception there would be swallowed and the tracing be over, so only code that a template runs is interrupted.
    """
    started, events = time.monotonic(), 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001
        nonlocal events
        events += 1
        file = frame.f_code.co_filename
        over = events > _MAX_EVENTS or time.monotonic() - started > _MAX_SECONDS
        if over and (file in _OWN_FILES or file.startswith(_OWN_FOLDERS)):
            raise ChatTemplateError("the chat template does not come to an end")
        return trace if file == _FILENAME else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def plain(value: Any) -> Any:
    """A copy made of JSON's own types, so that a template finds no methods but theirs."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    raise RequestError(
        f"a chat template takes text, numbers, lists and mappings, found a {type(value).__name__}: {value!r:.100}"
    )


def _holds_values(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)
