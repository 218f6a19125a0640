"""What a caller asks an answer to be: JSON of a schema, a text of a regex, one of some texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitwatt.errors import InvalidRequestError, shorten

__all__ = [
    "MAX_CHOICES",
    "MAX_GRAMMAR_CHARS",
    "MAX_REGEX_CHARS",
    "MAX_SCHEMA_CHARS",
    "GrammarKind",
    "GrammarSource",
    "StructuredOutputsParams",
]

MAX_SCHEMA_CHARS = 64 * 1024  # as JSON; OpenAI has 120,000 of names and values
MAX_REGEX_CHARS = 2048  # a mask of one of 60,000 takes 30 ms on a Zen 4 core
MAX_GRAMMAR_CHARS = 16 * 1024
MAX_CHOICES = 1000

GrammarKind = Literal["json", "regex", "choice", "grammar", "structural_tag", "shape"]
"""The last is answer_shapes.AnswerShape's: no caller writes one."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as its caller wrote it.

    text     JSON but for a regex and a grammar; within its kind's limit
    param    the request's field that errors name
    closes_objects   whether objects have no properties but those that the schema lists
    whitespace       the regex of what may stand between JSON's tokens, "" for nothing
    """

    kind: GrammarKind
    text: str
    param: str
    closes_objects: bool = False
    whitespace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must be: exactly one of the first six, under vLLM's names.

    json        a JSON schema, or one as text; 65536 characters at most
    regex       a regular expression of the whole answer, without look-around and back-references;
                2048 characters at most
    choice      texts, one of which the answer is; 1000 at most, of 65536 characters together
    grammar     in Lark, or in GBNF, which begins at root; 16384 characters at most
    json_object True for any JSON object
    structural_tag  text that goes by a schema between marks: {"structures": [{"begin", "schema",
                "end"}], "triggers": [...]}, or such as text
    disable_any_whitespace         whether JSON has none between its tokens
    disable_additional_properties  whether JSON's objects have the properties alone that are listed
    whitespace_pattern             a regex of what may stand between JSON's tokens; unless given a
                                   space, two, or a line's end and up to 20
    param       the request's field that errors name

    Raises  InvalidRequestError, which names the field, its value and the limit
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            told = f"it has {' and '.join(given)}" if given else "it has none"
            raise InvalidRequestError(
                f"{self.param} is one of {', '.join(_KINDS)}; {told}", param=self.param
            )
        for name, kinds, words in _TYPES:
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise self._wrong(name, f"is {shorten(value)}; it must be {words}")
        self.source()

    def source(self) -> GrammarSource:
        """Return the grammar that is asked for.

        Raises  InvalidRequestError beyond a limit
        """
        if self.json_object:
            return self._source("json", "json_object", '{"type":"object"}')
        if self.json is not None:
            return self._source("json", "json", self._as_json("json"), MAX_SCHEMA_CHARS)
        if self.regex is not None:
            return self._source("regex", "regex", self.regex, MAX_REGEX_CHARS)
        if self.grammar is not None:
            return self._source("grammar", "grammar", self.grammar, MAX_GRAMMAR_CHARS)
        if self.structural_tag is not None:
            text = self._as_json("structural_tag")
            return self._source("structural_tag", "structural_tag", text, MAX_SCHEMA_CHARS)
        choice = list(self.choice or ())
        if not choice or not all(isinstance(text, str) and text for text in choice):
            raise self._wrong(
                "choice", f"is {shorten(choice)}; it must be texts, none of them empty"
            )
        if len(choice) > MAX_CHOICES:
            raise self._wrong("choice", f"has {len(choice)} texts; the limit is {MAX_CHOICES}")
        text = json.dumps(choice, ensure_ascii=False)
        return self._source("choice", "choice", text, MAX_SCHEMA_CHARS)

    def _as_json(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, str):
            return value
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._wrong(name, f"is no JSON: {str(error)[:200]}") from None

    def _source(
        self, kind: GrammarKind, name: str, text: str, limit: int | None = None
    ) -> GrammarSource:
        if limit is not None and len(text) > limit:
            raise self._wrong(name, f"has {len(text)} characters; the limit is {limit}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._wrong(name, "is not Unicode: it has a lone surrogate") from None
        whitespace = self.whitespace_pattern
        if whitespace is not None and len(whitespace) > MAX_REGEX_CHARS:
            raise self._wrong(
                "whitespace_pattern",
                f"has {len(whitespace)} characters; the limit is {MAX_REGEX_CHARS}",
            )
        return GrammarSource(
            kind,
            text,
            self._named(name),
            self.disable_additional_properties,
            "" if self.disable_any_whitespace else whitespace,
        )

    def _wrong(self, name: str, told: str) -> InvalidRequestError:
        named = self._named(name)
        return InvalidRequestError(f"{named} {told}", param=named)

    def _named(self, name: str) -> str:
        """Return the field of the request: what response_format asks is all its own."""
        return f"{self.param}.{name}" if self.param == "structured_outputs" else self.param


_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_TEXT = (str,)
_JSON_TEXT = (str, Mapping)
_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("json", (*_JSON_TEXT, bool), "a JSON schema"),
    ("regex", _TEXT, "a string"),
    ("choice", (list, tuple), "a list of strings"),
    ("grammar", _TEXT, "a string"),
    ("json_object", (bool,), "true or false"),
    ("structural_tag", _JSON_TEXT, "an object, or one as text"),
    ("disable_any_whitespace", (bool,), "true or false"),
    ("disable_additional_properties", (bool,), "true or false"),
    ("whitespace_pattern", _TEXT, "a string"),
)
