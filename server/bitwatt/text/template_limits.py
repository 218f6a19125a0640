"""How much time and memory a template may take, and how much its operations would.

What makes much of little is measured before it works: `'a' * 3000000000` has three operands' worth
of text and a result of 3 GB.
"""

import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

import jinja2

__all__ = [
    "SIZES_OF_FILTERS",
    "SIZES_OF_METHODS",
    "TemplateLimitError",
    "Work",
    "check_number",
    "size_of",
    "size_of_format",
    "size_of_result",
]

_MAX_SIZE = 16 * 1024 * 1024  # of one value: characters and elements, with all within them
_MAX_ELEMENTS = 1_000_000  # of one value; they take 0.3 us each to count
_MAX_TOTAL = 512 * 1024 * 1024  # of all values that a rendering makes
_MAX_INT_BITS = 4096
_MAX_NUMBER = 100_000  # of a width or a count that a template writes
_MAX_FORMATTED = 2000  # characters of a number, or of a width of three digits
_CALLS_BETWEEN_LOOKS = 16  # at the clock, which is a system call of 0.3 us
_LARGE = 10_000  # of values that take as long to make as a look at the clock
_WIDE = {  # a width from an argument, or of more than three digits
    "%": re.compile(r"%[^a-zA-Z%]*(\*|\d{4,})"),
    "{": re.compile(r"\{[^{}]*:[^{}]*(\{|\d{4,})"),
}

_COLLECTIONS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)


class TemplateLimitError(jinja2.TemplateError):
    """A template asks for more time or memory than a rendering has."""


class Work:
    """What one rendering has taken so far. Of one thread."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._deadline = time.thread_time() + time_limit_s
        self._calls = 0
        self._total = 0

    def count_call(self) -> None:
        """Raises TemplateLimitError once the thread's own time, not the clock's, is up."""
        self._calls += 1
        if self._calls % _CALLS_BETWEEN_LOOKS == 0:
            self._look()

    def charge(self, size: int) -> None:
        """Raises TemplateLimitError if a value of this size is too large, or one too many."""
        self._total += size
        if size > _MAX_SIZE or self._total > _MAX_TOTAL:
            raise TemplateLimitError(
                f"it makes a value of {size} characters or elements, {self._total} with all "
                f"others; the limits are {_MAX_SIZE} and {_MAX_TOTAL}"
            )
        if size > _LARGE:
            self._look()

    def _look(self) -> None:
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(
                f"it takes more than {self._time_limit_s:g} s of processor time"
            )


def size_of(value: Any) -> int:
    """Return characters of a text or elements of a collection, those within counted each time."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, _COLLECTIONS):
        return 1
    size, num_elements = 0, 0
    waiting: list[Any] = [value]
    while waiting:
        value = waiting.pop()
        num_elements += 1
        if num_elements + len(waiting) > _MAX_ELEMENTS:
            raise TemplateLimitError(f"it makes a value of more than {_MAX_ELEMENTS} elements")
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, _COLLECTIONS):
            waiting.extend(value)
    return size + num_elements


def check_number(value: Any) -> int:
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise TemplateLimitError(f"it asks for {value}; the limit is {_MAX_NUMBER}")
    return value if isinstance(value, int) else 0


def size_of_result(operator: str, left: Any, right: Any) -> int:
    if operator == "%" and isinstance(left, str):
        return size_of_format(left, "%", (right,), {})
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * max(right, 0) if operator == "**" else bits + right.bit_length()
        if bits > _MAX_INT_BITS:
            raise TemplateLimitError(f"it makes a number of {bits} bits; {_MAX_INT_BITS} are taken")
        return 1
    if operator == "*":
        if isinstance(left, int):
            left, right = right, left
        return size_of(left) * right if isinstance(right, int) and right > 0 else 1
    if operator == "+" and isinstance(left, str | list | tuple):
        return len(left) + (len(right) if isinstance(right, str | list | tuple) else 1)
    return 1


def size_of_format(text: str, mark: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    if _WIDE[mark].search(text):
        raise TemplateLimitError("it formats to a width of four digits or from an argument")
    largest = max(map(size_of, (*args, *kwargs.values())), default=0)
    return len(text) + text.count(mark) * (largest + _MAX_FORMATTED)


def _size_of_padded(text: Any, width: Any = 80, *_: Any, **__: Any) -> int:
    return size_of(text) + check_number(width)


def _size_of_replaced(text: Any, old: Any, new: Any = "", *_: Any, **__: Any) -> int:
    text, old = str(text), str(old)
    return len(text) + (text.count(old) * size_of(new) if len(new) > len(old) else 0)


def _size_of_indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    wide = len(width) if isinstance(width, str) else width
    return size_of(text) + (str(text).count("\n") + 1) * check_number(wide)


def _size_of_batches(_value: Any, count: Any, *_: Any, **__: Any) -> int:
    return check_number(count) + 1


def _size_of_joined(value: Any, separator: Any = "", *_: Any, **__: Any) -> int:
    if not isinstance(value, (str, *_COLLECTIONS)):
        return 1  # a generator, of values that are counted where they are made
    return size_of(value) + len(value) * size_of(separator)


def _size_of_rounded(_value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
    check_number(precision * 100)
    return 1


def _size_of_wrapped(
    text: Any, _width: Any = 79, _long_words: Any = True, wrapstring: Any = "", *_: Any
) -> int:
    return size_of(text) * (1 + size_of(wrapstring))


def _size_of_translated(text: str, table: Any) -> int:
    longest = max(map(size_of, table.values()), default=1) if isinstance(table, Mapping) else 1
    return len(text) * longest


SIZES_OF_METHODS: Mapping[str, Callable[..., int]] = {
    "center": _size_of_padded,
    "expandtabs": lambda text, tabsize=8: (
        len(text) + text.count("\t") * max(check_number(tabsize), 0)
    ),
    "join": lambda text, values: _size_of_joined(values, text),
    "ljust": _size_of_padded,
    "replace": _size_of_replaced,
    "rjust": _size_of_padded,
    "translate": _size_of_translated,
    "zfill": _size_of_padded,
}
SIZES_OF_FILTERS: Mapping[str, Callable[..., int]] = {
    "batch": _size_of_batches,
    "center": _size_of_padded,
    "format": lambda text, *args, **kwargs: size_of_format(str(text), "%", args, kwargs),
    "indent": _size_of_indented,
    "join": _size_of_joined,
    "pprint": size_of,
    "replace": _size_of_replaced,
    "round": _size_of_rounded,
    "slice": _size_of_batches,
    "string": size_of,
    "wordwrap": _size_of_wrapped,
}
