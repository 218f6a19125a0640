"""From a grammar as its caller wrote it to one that llguidance matches tokens by.

llguidance lets go of the interpreter's lock (GIL) while it builds a grammar, and its limits bound
most of what a hostile one costs, but not all: a thousand rules in a row overflow its stack, and a
JSON number that is a multiple of a large prime takes 20 s. So what a caller sends is first built in
a process that may be ended (checker.py), by the very limits, tokens and library of the engine's.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag
from llguidance.gbnf_to_lark import any_to_lark as gbnf_to_lark

from bitwatt.constraints.answer_shapes import ANSWER, AnswerShape
from bitwatt.constraints.matching import one_line, why_unusable
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.errors import InvalidRequestError

__all__ = [
    "LIMITS",
    "TokenBytes",
    "as_matchers_know",
    "compile_grammar",
    "new_tokenizer",
    "refused",
    "written_for_matcher",
]

DEFAULT_WHITESPACE = r" {1,2}|\n {0,20}"
"""Between JSON's tokens: with more, a model that has lost its way fills its answer."""

# Schemas of 100 enums, of 500 optional properties, or an enum of 1000 take 30,000 of the first;
# what takes the default's 1,000,000 can take a second for each token.
LIMITS = {
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
_CLOSED_MAPS = ("properties", "patternProperties", "$defs", "definitions")


class TokenBytes(msgspec.Struct, frozen=True, tag="token_bytes"):
    """The bytes of every token of a model's tokenizer, by its id.

    special  ids of tokens that are no text: a grammar can name them by their bytes
    """

    tokens: list[bytes]
    special: list[int]


class _TokenizerForMatcher:
    """What LLTokenizer asks of a tokenizer; it has no text encoded where nothing is forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError(text)


def new_tokenizer(token_bytes: TokenBytes, vocab_size: int) -> LLTokenizer:
    """Return the tokens as matchers know them, and one more, vocab_size, that ends an answer.

    No model draws that one: its bit in a mask says that the answer may end, by whatever token.

    vocab_size  rows of the model's head; those without a token are never allowed
    """
    tokens, special = as_matchers_know(token_bytes, vocab_size)
    # Typed for the package's own class, of which it reads what is here.
    wrapper: Any = _TokenizerForMatcher(tokens, sorted(special), vocab_size)
    return LLTokenizer(wrapper, n_vocab=vocab_size + 1, eos_token=[vocab_size])


def as_matchers_know(token_bytes: TokenBytes, vocab_size: int) -> tuple[list[bytes], set[int]]:
    """Return the bytes of the tokens of new_tokenizer, and which of them are special."""
    known = token_bytes.tokens[:vocab_size]
    special = {i for i in token_bytes.special if i < vocab_size}
    special |= {i for i, data in enumerate(known) if not data}
    special |= {*range(len(known), vocab_size + 1)}
    padding = [b""] * (vocab_size + 1 - len(known))
    tokens = [data or b"<|unused %d|>" % i for i, data in enumerate([*known, *padding])]
    return tokens, special


def written_for_matcher(source: GrammarSource) -> str:
    """Return the grammar as llguidance takes it: JSON, which may be wrong yet.

    Raises  InvalidRequestError
    """
    try:
        return _write(source)
    except InvalidRequestError:
        raise
    except Exception as error:  # whatever a hostile text makes of them
        raise refused(source, str(error) or type(error).__name__) from None


def _write(source: GrammarSource) -> str:
    match source.kind:
        case "json":
            return _lark(f"start: %json {_schema(source, json.loads(source.text))}")
        case "regex":
            [grammar] = json.loads(LLMatcher.grammar_from_regex(source.text))["grammars"]
            return _lark(grammar["lark_grammar"])
        case "choice":
            choice = [json.dumps(text, ensure_ascii=False) for text in json.loads(source.text)]
            return _lark(f"start: {' | '.join(choice)}")
        case "grammar":
            if "%llguidance" in source.text:
                raise ValueError("%llguidance sets what is not a caller's to set")
            is_gbnf = "::=" in source.text
            return _lark(gbnf_to_lark(source.text) if is_gbnf else source.text)
        case "structural_tag":
            return _lark(_tags(source, json.loads(source.text)))
        case "shape":
            return _shape(source, msgspec.json.decode(source.text, type=AnswerShape))


def _shape(source: GrammarSource, shape: AnswerShape) -> str:
    grammars = [{"lark_grammar": _lark(shape.lark(lambda schema: _schema(source, schema)))}]
    if shape.answer is not None:
        grammars.append({"name": ANSWER, "lark_grammar": _write(shape.answer)})
    return json.dumps({"grammars": grammars})


def _lark(grammar: str) -> str:
    # Text that must come next would be allowed in the tokenizer's own tokens alone, which it isn't
    # asked for here: a mask allows every token that begins such a text.
    return LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{grammar}')


def _schema(source: GrammarSource, schema: Any) -> str:
    if schema is False:
        raise ValueError("nothing is valid under the schema false")
    if not isinstance(schema, dict) and schema is not True:
        raise ValueError("a schema is an object, true or false")
    schema = {} if schema is True else schema
    if source.closes_objects:
        schema = _closed(schema)
    whitespace = DEFAULT_WHITESPACE if source.whitespace is None else source.whitespace
    options = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return json.dumps({**schema, "x-guidance": options})


def _closed(schema: Any) -> Any:
    """Return the schema with additionalProperties false wherever it lists properties."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        name: {key: _closed(item) for key, item in value.items()}
        if name in _CLOSED_MAPS and isinstance(value, dict)
        else value
        if name in ("const", "enum", "default", "examples")
        else _closed(value)
        for name, value in schema.items()
    }
    if "properties" in closed or "patternProperties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _tags(source: GrammarSource, given: Any) -> str:
    if not isinstance(given, Mapping):
        raise ValueError('it must be an object with "structures" and "triggers"')
    structures, triggers = given.get("structures"), given.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise ValueError("structures must be a list that isn't empty")
    if not isinstance(triggers, list) or not _are_texts(*triggers) or not all(triggers):
        raise ValueError("triggers must be texts, none empty")
    tags = []
    for tag in structures:
        is_tag = isinstance(tag, Mapping) and _are_texts(tag.get("begin"), tag.get("end"))
        if not is_tag or "schema" not in tag:
            raise ValueError("each of structures has a begin, a schema and an end")
        trigger = next((text for text in triggers if tag["begin"].startswith(text)), None)
        if trigger is None:
            raise ValueError(f"no trigger begins {tag['begin'][:80]!r}")
        schema = _schema(source, tag["schema"])
        tags.append(StructTag(trigger=trigger, begin=tag["begin"], grammar=schema, end=tag["end"]))
    # Marks are text here: a special token is none, and no answer has it.
    return StructTag.to_grammar(tags, assume_special=False).replace("%llguidance {}\n", "", 1)


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _limits() -> LLParserLimits:
    given: dict[str, Any] = LIMITS
    return LLParserLimits(**given)


def compile_grammar(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Return a matcher at the grammar's start; other threads run meanwhile.

    Raises  ValueError of one line
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if reason := why_unusable(matcher):
        raise ValueError(reason)
    return matcher


def refused(source: GrammarSource, reason: str) -> InvalidRequestError:
    """Return the error of a grammar that can't be used."""
    told = f"{source.param} can't be followed: {one_line(reason)}"
    return InvalidRequestError(told, param=source.param)
