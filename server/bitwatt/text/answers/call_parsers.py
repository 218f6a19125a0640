"""Where tool calls stand in an answer: between marks, or as bare JSON at its beginning."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from bitwatt.text.answers.json_call import JsonCall
from bitwatt.text.answers.pieces import AnswerPiece, Content
from bitwatt.text.answers.xml_call import XmlCall
from bitwatt.text.stops import start_of_partial

__all__ = ["BareCalls", "TaggedCalls"]

_OPEN, _CLOSE, _FUNCTION = "<tool_call>", "</tool_call>", "<function="
_PYTHON_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"


class _Calls(ABC):
    """What both have: content up to a call, one call at a time, and whatever turns out to be none.

    Text of what looks like a call is kept until it is one, for it is content otherwise. Where the
    answer is calls and nothing else, by a grammar, it is the beginning of one that was cut, of
    which nothing can be told; and what stands between calls is nobody's.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], must_call: bool = False) -> None:
        """Begin.

        tools      JSON schemas of parameters by name
        must_call  whether the answer is calls and nothing else
        """
        self._tools = tools
        self._must_call = must_call
        self._held = ""
        self._call: JsonCall | XmlCall | None = None
        self._raw = ""  # of the call at hand, until it is certain to be one
        self._num_calls = 0

    def push(self, text: str) -> list[AnswerPiece]:
        """Return what is certain now."""
        pieces: list[AnswerPiece] = []
        self._held += text
        while self._push_call(pieces) if self._call is not None else self._advance(pieces):
            pass
        return pieces

    @abstractmethod
    def _advance(self, pieces: list[AnswerPiece]) -> bool:
        """Take the next part of the text held; return whether there may be another."""

    def _begin(self, call: JsonCall | XmlCall, raw: str) -> bool:
        self._call, self._raw = call, raw
        return True

    def _push_call(self, pieces: list[AnswerPiece]) -> bool:
        call, text = self._call, self._held
        assert call is not None
        self._held = ""
        told, rest = call.push(text)
        pieces += told
        if call.is_opened:
            self._raw = ""
        else:
            self._raw += text
        if not call.is_over:
            return False
        self._call = None
        if call.is_opened:
            self._num_calls += 1
            self._held = rest
            self._after_call()
        else:
            self._tell(self._after_none(), pieces)
        return True

    @abstractmethod
    def _after_call(self) -> None:
        """Go on behind a call."""

    @abstractmethod
    def _after_none(self) -> str:
        """Go on where what looked like a call is none; return what of _raw is content by now."""

    @abstractmethod
    def _content(self, text: str) -> str:
        """Return what of the text is content where it stands."""

    def _tell(self, text: str, pieces: list[AnswerPiece]) -> None:
        """Put content into the pieces."""
        if (content := self._content(text)) and not self._must_call:
            pieces.append(Content(content))

    def _close(self) -> list[AnswerPiece]:
        """Return the end of the call at hand; _held has what is none."""
        call, self._call = self._call, None
        if call is None:
            return []
        told = call.close()
        self._held = "" if call.is_opened else self._raw
        return told


class TaggedCalls(_Calls):
    """Calls between <tool_call> and </tool_call>: JSON as Hermes and Qwen write it, or XML.

    Text may stand before, between and behind them; white space beside a mark is nobody's. What
    stands between a call's end and its closing mark, as a brace too many, is dropped.
    """

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        must_call: bool = False,
        *,
        bare_functions: bool,
    ) -> None:
        """Begin; bare_functions are those in XML without <tool_call> before them."""
        super().__init__(tools, must_call)
        self._marks = (_OPEN, _FUNCTION) if bare_functions else (_OPEN,)
        self._is_behind_call = False  # so that its closing mark may come
        self._drops_space = False  # for a call stands before
        self._is_in_mark = False  # <tool_call> was read, and nothing behind it

    def finish(self) -> list[AnswerPiece]:
        """Return the rest."""
        if self._call is not None:
            pieces = self._close()
        else:
            pieces = []
            if self._is_in_mark:
                self._held = _OPEN + self._held
            if self._is_behind_call and _CLOSE.startswith(self._held.strip()):
                self._held = ""
        self._is_behind_call = self._is_in_mark = False
        self._tell(self._held, pieces)
        self._held = ""
        return pieces

    def _advance(self, pieces: list[AnswerPiece]) -> bool:
        if self._is_behind_call:
            return self._skip_to_mark()
        if self._is_in_mark:
            return self._begin_call()
        at, mark = self._find_mark()
        if mark is None:
            certain = self._held[: min(start_of_partial(self._held, m) for m in self._marks)]
            certain = certain.rstrip()
            self._held = self._held[len(certain) :]
            self._tell(certain, pieces)
            return False
        self._tell(self._held[:at].rstrip(), pieces)
        self._held = self._held[at + len(mark) :]
        if mark == _OPEN:
            self._is_in_mark = True
            return True
        return self._begin(XmlCall(self._num_calls, self._tools), mark)

    def _find_mark(self) -> tuple[int, str | None]:
        found = [(self._held.find(mark), mark) for mark in self._marks]
        return min([(at, mark) for at, mark in found if at >= 0], default=(-1, None))

    def _begin_call(self) -> bool:
        """Choose how to read what follows <tool_call>."""
        body = self._held.lstrip()
        if _FUNCTION.startswith(body) and body != _FUNCTION:
            return False
        self._is_in_mark = False
        raw = _OPEN + self._held[: len(self._held) - len(body)]
        if body.startswith(_FUNCTION):
            self._held = body.removeprefix(_FUNCTION)
            return self._begin(XmlCall(self._num_calls, self._tools), raw + _FUNCTION)
        self._held = body
        return self._begin(JsonCall(self._num_calls), raw)

    def _skip_to_mark(self) -> bool:
        at_close = self._held.find(_CLOSE)
        at, _ = self._find_mark()
        if at_close < 0 and at < 0:
            return False
        self._is_behind_call = False
        if at < 0 or 0 <= at_close < at:
            self._held = self._held[at_close + len(_CLOSE) :]
        else:
            self._held = self._held[at:]
        return True

    def _after_call(self) -> None:
        self._is_behind_call = self._drops_space = True

    def _after_none(self) -> str:
        """Return the mark's first character; the rest is looked at again."""
        told, self._held, self._raw = self._raw[0], self._raw[1:], ""
        return told

    def _content(self, text: str) -> str:
        if self._drops_space:
            text = text.lstrip()
            self._drops_space = not text
        return text


class BareCalls(_Calls):
    """Calls that are JSON at an answer's very beginning, as Llama 3 writes them.

    JSON is a call only with the name of a tool and with arguments, unless it must be one. Several
    stand behind one another, with white space, a semicolon or a comma between. Other text ends
    them.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], must_call: bool = False) -> None:
        """Begin."""
        super().__init__(tools, must_call)
        self._is_content = False
        self._has_told = False

    def finish(self) -> list[AnswerPiece]:
        """Return the rest."""
        pieces = self._close()
        self._tell(self._held, pieces)
        self._held = ""
        return pieces

    def _advance(self, pieces: list[AnswerPiece]) -> bool:
        if self._is_content:
            text, self._held = self._held, ""
            self._tell(text, pieces)
            return False
        body = self._held.lstrip(_BETWEEN if self._num_calls else None)
        if _PYTHON_TAG.startswith(body) and body != _PYTHON_TAG:
            return False
        call = body.removeprefix(_PYTHON_TAG).lstrip()
        if not call:
            return False
        if call[0] != "{":
            self._is_content = True
            return True
        raw = self._held[: len(self._held) - len(call)]
        self._held = call
        known = None if self._must_call else self._tools
        return self._begin(JsonCall(self._num_calls, known=known), raw)

    def _after_call(self) -> None:
        """Go on with what stands behind it."""

    def _after_none(self) -> str:
        self._held, self._raw = self._raw, ""
        self._is_content = True
        return ""

    def _content(self, text: str) -> str:
        if self._num_calls and not self._has_told:
            text = text.lstrip(_BETWEEN)
        self._has_told = self._has_told or bool(text)
        return text
