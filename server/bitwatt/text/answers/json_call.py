"""One tool call in JSON, {"name": …, "arguments": {…}}, read as its characters come."""

import json
from collections.abc import Collection
from typing import Literal

from bitwatt.text.answers.pieces import AnswerPiece, CallArguments, CallClosed, CallOpened

__all__ = ["JsonCall"]

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"
_Place = Literal["before", "key or end", "key", "colon", "value", "in value", "comma or end"]


class JsonCall:
    """Reads one object. Its arguments come as they stand, unchecked but for where they end.

    is_opened  its name is told, so that it is a call for good
    is_over    the object has ended, or it is none
    """

    def __init__(self, index: int, *, known: Collection[str] | None = None) -> None:
        """Begin before the object.

        known  names of tools; where it is given, an object is a call only with such a name and
               with arguments, for text that may be JSON and no call
        """
        self._index = index
        self._known = known
        self._place: _Place = "before"
        self._key = ""
        self._pending: list[str] = []  # of the key or the value at hand
        self._first = ""  # character of the value at hand
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._name: str | None = None
        self._arguments: list[str] = []  # that are not told yet
        self._has_arguments = self._ends_arguments = False
        self.is_opened = self.is_over = False

    def push(self, text: str) -> tuple[list[AnswerPiece], str]:
        """Return what is certain now, and the text behind the object."""
        pieces: list[AnswerPiece] = []
        at = 0
        while at < len(text) and not self.is_over:
            if self._is_in_value:
                end, is_whole = self._end_of_value(text, at)
                self._pending.append(text[at:end])
                at = end
                if is_whole:
                    self._place = "comma or end"
                    self._take_value(pieces)
            else:
                self._step(text[at], pieces)
                at += not self._is_in_value
        if self._is_in_value and self._first in "{[" and self._is_arguments:
            self._tell("".join(self._pending), pieces)
            self._pending = []
        return pieces, text[at:]

    def close(self) -> list[AnswerPiece]:
        """Return what ends a call whose text was cut; nothing where it isn't one yet."""
        if not self.is_opened or self.is_over:
            return []
        pieces: list[AnswerPiece] = []
        is_cut = not self._ends_arguments
        if self._is_in_value and self._is_arguments:
            self._take_value(pieces)
        self._end(pieces, is_cut=is_cut)
        return pieces

    @property
    def _is_in_value(self) -> bool:
        return self._place == "in value"

    @property
    def _is_arguments(self) -> bool:
        return self._key in _ARGUMENTS and not self._ends_arguments

    def _step(self, char: str, pieces: list[AnswerPiece]) -> None:
        """Take a character that is no value's; the first of one only turns to it."""
        place = self._place
        if place == "key":
            self._pending.append(char)
            if self._ends_string(char):
                self._key = _unquoted("".join(self._pending))
                self._place = "colon"
        elif char in _SPACE:
            return
        elif place == "before" and char == "{":
            self._place = "key or end"
        elif place == "key or end" and char == '"':
            self._place, self._pending, self._in_string = "key", [char], True
        elif place in ("key or end", "comma or end") and char == "}":
            self._finish_object(pieces)
        elif place == "colon" and char == ":":
            self._place = "value"
        elif place == "value" and char not in ",:]}":
            self._place, self._pending, self._first = "in value", [], char
        elif place == "comma or end" and char == ",":
            self._place = "key or end"
        else:
            self._end(pieces)

    def _end_of_value(self, text: str, start: int) -> tuple[int, bool]:
        """Return where in the text the value at hand ends; or where the text does, and False."""
        for at in range(start, len(text)):
            char = text[at]
            if self._in_string:
                is_end = self._ends_string(char) and not self._depth
            elif char == '"':
                self._in_string = True
                continue
            elif char in "{[":
                self._depth += 1
                continue
            elif char in "}]" and self._depth:
                self._depth -= 1
                is_end = not self._depth
            elif not self._depth and (char in _SPACE or char in ",}]"):
                return at, True
            else:
                continue
            if is_end:
                return at + 1, True
        return len(text), False

    def _ends_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            return True
        return False

    def _take_value(self, pieces: list[AnswerPiece]) -> None:
        value = "".join(self._pending)
        self._pending = []
        self._depth, self._in_string, self._is_escaped = 0, False, False
        if self._key == "name" and self._name is None:
            self._name = _unquoted(value) if self._first == '"' else ""
            if not self._name or (self._known is not None and self._name not in self._known):
                self._end(pieces)
                return
            self._tell("", pieces)
        elif self._is_arguments:
            if self._first == '"':  # JSON within a string, as the APIs have it
                value = _unquoted(value)
            self._tell("{}" if value == "null" else value, pieces)
            self._ends_arguments = True

    def _tell(self, arguments: str, pieces: list[AnswerPiece]) -> None:
        """Put more of the arguments into the pieces, once the name is told."""
        if arguments:
            self._has_arguments = True
            self._arguments.append(arguments)
        if not self.is_opened and self._name and (self._known is None or self._has_arguments):
            self.is_opened = True
            pieces.append(CallOpened(self._index, self._name))
        if self.is_opened and self._arguments:
            pieces.append(CallArguments(self._index, "".join(self._arguments)))
            self._arguments = []

    def _finish_object(self, pieces: list[AnswerPiece]) -> None:
        if self.is_opened and not self._has_arguments:
            self._tell("{}", pieces)
        self._end(pieces)

    def _end(self, pieces: list[AnswerPiece], *, is_cut: bool = False) -> None:
        self.is_over = True
        if self.is_opened:
            pieces.append(CallClosed(self._index, is_cut))


def _unquoted(text: str) -> str:
    """Return the string that a JSON string stands for, though it may be cut; "" where it's none."""
    for ending in ("", '"'):
        try:
            value = json.loads(text + ending, strict=False)
        except ValueError:
            continue
        return value if isinstance(value, str) else ""
    return ""
