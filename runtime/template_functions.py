"""Filters and functions that a chat template may call where Jinja's or Python's own know no bounds.

Each refuses with a `ChatTemplateError` what would take too long or grow too large inside C, where no budget of lines
ends it.
"""

import datetime
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jinja2
from jinja2 import Environment
from jinja2.filters import do_batch, do_indent, do_round, make_attrgetter

from .. import ChatTemplateError

_MAX_FORMAT = 10_000  # characters of a format string
_MAX_ARGUMENT = 100  # columns that indenting or a format may add; characters of a text that is searched for backwards


def require_padding(width: int | str) -> None:
    """Refuse columns beyond the bound, and a width that is only known while formatting."""
    if str(width) in ("*", "{") or not 0 <= int(width) <= _MAX_ARGUMENT:
        raise ChatTemplateError(f"the chat template pads to a width of {width}; at most {_MAX_ARGUMENT} is allowed")


def require_format(form: str) -> None:
    """Refuse a format string beyond the bound."""
    if len(form) > _MAX_FORMAT:
        raise ChatTemplateError(f"the chat template uses a format of {len(form)} characters; {_MAX_FORMAT} are allowed")


def require_short(argument: Any) -> Any:
    """An argument of a search; itself."""
    if isinstance(argument, str) and len(argument) > _MAX_ARGUMENT:
        raise ChatTemplateError(f"the chat template searches for {len(argument)} characters at once")
    return argument


def trim(text: Any, chars: str | None = None) -> str:
    """Strip a text of white space, or of few characters."""
    return (text if isinstance(text, str) else str(text)).strip(require_short(chars))


def batch(value: Any, linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    """Jinja's, with a bounded number of columns."""
    return do_batch(value, len(range_(linecount)), fill_with)


def indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's, by a bounded width."""
    require_padding(len(width) if isinstance(width, str) else width)
    return do_indent(str(text), width, first, blank)


def round_(value: float, precision: int = 0, method: Any = "common") -> float:
    """Jinja's, to a bounded precision."""
    require_padding(abs(precision))
    return do_round(value, precision, method)


@jinja2.pass_environment
def sum_(
    environment: Environment, values: Iterable[Any], attribute: str | int | None = None, start: float = 0
) -> float:
    """Sum numbers: lists would be copied once an element."""
    if not isinstance(start, (int, float)):
        raise ChatTemplateError("the chat template sums what are not numbers")
    return sum(values if attribute is None else map(make_attrgetter(environment, attribute), values), start)


def range_(*arguments: int) -> range:
    """Python's, of a bounded length."""
    result = range(*arguments)
    if len(result) > 100_000:
        raise ChatTemplateError("the chat template asks for a range that is too long")
    return result


def dict_(pairs: Any = (), /, **named: Any) -> dict[Any, Any]:
    """Python's, of a bounded number of pairs."""
    if len(pairs) > 1000:  # numbers can be chosen so that each is looked up among all others
        raise ChatTemplateError("the chat template makes a value that is too large")
    return dict(pairs, **named)


def raise_exception(message: Any) -> NoReturn:
    """Refuse the conversation in the template's own words."""
    raise ChatTemplateError(f"the chat template refuses this conversation: {str(message)[:500]}")


def strftime_now(form: str) -> str:
    """Today's date and time, in a short format."""
    require_padding(len(form))
    return datetime.datetime.now().strftime(form)
