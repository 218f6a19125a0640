"""One tool call as Qwen3-Coder writes it, between <function=NAME> and </function>.

Each parameter stands between marks of its own, text as it is and other values in JSON; which of
both it is, the tool's schema says.
"""

import json
from collections.abc import Mapping
from typing import Any

from bitwatt.text.answers.pieces import AnswerPiece, CallArguments, CallClosed, CallOpened
from bitwatt.text.stops import start_of_partial

__all__ = ["XmlCall"]

_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_END, _END_OF_CALL = "</function>", "</tool_call>"
_MAX_NAME_CHARS = 256


class XmlCall:
    """Reads what follows <function=, and puts its parameters as a JSON object.

    is_opened  its name is told, so that it is a call for good
    is_over    the call has ended, or it is none
    """

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin before the name; tools are JSON schemas of parameters by name."""
        self._index = index
        self._tools = tools
        self._schemas: Mapping[str, Any] = {}
        self._held = ""
        self._parameter: str | None = None  # the one whose value is read
        self._value_has_begun = self._is_text = False
        self._num_parameters = 0
        self.is_opened = self.is_over = False

    def push(self, text: str) -> tuple[list[AnswerPiece], str]:
        """Return what is certain now, and the text behind the call."""
        pieces: list[AnswerPiece] = []
        self._held += text
        while not self.is_over and self._advance(pieces):
            pass
        if not self.is_over:
            return pieces, ""
        rest, self._held = self._held, ""
        return pieces, rest

    def close(self) -> list[AnswerPiece]:
        """Return what ends a call whose text was cut; nothing where it isn't one yet."""
        if not self.is_opened or self.is_over:
            return []
        self.is_over = True
        return [CallClosed(self._index, is_cut=True)]

    def _advance(self, pieces: list[AnswerPiece]) -> bool:
        """Take one mark, name or piece of a value; return whether there was a whole one."""
        if not self.is_opened:
            return self._read_name(pieces)
        if self._parameter is not None:
            return self._read_value(pieces)
        marks = ((self._held.find(mark), mark) for mark in (_PARAMETER, _END, _END_OF_CALL))
        at, mark = min((found for found in marks if found[0] >= 0), default=(-1, ""))
        if at < 0:
            return False
        if mark != _PARAMETER:
            self._held = self._held[at:].removeprefix(_END)
            self._tell("}" if self._num_parameters else "{}", pieces)
            self.is_over = True
            pieces.append(CallClosed(self._index))
            return True
        name, is_whole, rest = self._held[at + len(mark) :].partition(">")
        if not is_whole:
            return False
        self._parameter = name.strip()
        self._held = rest
        self._value_has_begun = False
        self._is_text = _is_text(self._schemas.get(self._parameter))
        opening = "{" if not self._num_parameters else ", "
        self._num_parameters += 1
        key = json.dumps(self._parameter, ensure_ascii=False)
        self._tell(f"{opening}{key}: " + '"' * self._is_text, pieces)
        return True

    def _read_name(self, pieces: list[AnswerPiece]) -> bool:
        name, is_whole, rest = self._held.partition(">")
        if "\n" in name or "<" in name or len(name) > _MAX_NAME_CHARS:
            self.is_over = True
            return False
        if not is_whole:
            return False
        self._held = rest
        if not name.strip():
            self.is_over = True
            return False
        self.is_opened = True
        given = self._tools.get(name.strip(), {}).get("properties")
        self._schemas = given if isinstance(given, Mapping) else {}
        pieces.append(CallOpened(self._index, name.strip()))
        return True

    def _read_value(self, pieces: list[AnswerPiece]) -> bool:
        if not self._value_has_begun:
            if not self._held:
                return False
            self._held = self._held.removeprefix("\n")
            self._value_has_begun = True
        end = self._held.find(_END_PARAMETER)
        if end < 0:
            if self._is_text:
                certain = self._held[: start_of_partial(self._held, _END_PARAMETER)]
                certain = certain.removesuffix("\n")
                self._tell(_escaped(certain), pieces)
                self._held = self._held[len(certain) :]
            return False
        value = self._held[:end].removesuffix("\n")
        self._held = self._held[end + len(_END_PARAMETER) :]
        if self._is_text:
            self._tell(_escaped(value) + '"', pieces)
        else:
            self._tell(_as_json(value, self._schemas.get(self._parameter or "")), pieces)
        self._parameter = None
        return True

    def _tell(self, arguments: str, pieces: list[AnswerPiece]) -> None:
        if arguments:
            pieces.append(CallArguments(self._index, arguments))


def _escaped(text: str) -> str:
    """Return the text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types(schema: Any) -> list[Any]:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind if isinstance(kind, list) else [kind]


def _is_text(schema: Any) -> bool:
    """Return whether a value is text, whatever it looks like: also where no schema says."""
    if not isinstance(schema, Mapping) or not schema:
        return True
    listed = schema.get("enum")
    if "type" not in schema and isinstance(listed, list):
        return all(isinstance(value, str) for value in listed)
    return _types(schema) == ["string"]


def _as_json(value: str, schema: Any) -> str:
    """Return a value in JSON: as text where it is no JSON, or Python's word for a constant."""
    kinds = _types(schema)
    word = value.strip()
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower()
    try:
        parsed = json.loads(word)
        return json.dumps(parsed, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return "null" if word == "None" else json.dumps(value, ensure_ascii=False)
