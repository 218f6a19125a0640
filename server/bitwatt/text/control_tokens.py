"""Keeps what callers write from becoming a model's control tokens.

A conversation is rendered into one text, in which `<|eot_id|>` ends a turn where the chat template
wrote it and is mere letters where a caller did. Who wrote it is found by rendering a copy of the
messages with a mark at every character that could begin a control token. The copy tells which
control tokens of the real text are the callers'; those alone are then encoded letter by letter.
Without any the tokens are what the tokenizer makes of the whole text.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, normalizers

from bitwatt.errors import InvalidRequestError, shorten
from bitwatt.text.encoding import encode

__all__ = ["ControlTokens", "Span", "texts_within"]

T = TypeVar("T")
Span = tuple[int, int]
"""Where something starts and ends in a text."""

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_STAND_INS = [*range(0xFDD0, 0xFDF0), *_PRIVATE_USE]  # noncharacters first: no text has them


class ControlTokens:
    """The tokens that a chat template directs its model with. Safe in any thread.

    These are the special tokens, and of the other added tokens those that the template's own text
    holds and that aren't white space: what transformers takes them for.
    """

    def __init__(
        self, tokenizer: Tokenizer, literals: str, listed: Collection[str] | None = None
    ) -> None:
        """Find them.

        literals  the template's own text
        listed    the other added tokens instead, as `chat_control_tokens` of a
                  tokenizer_config.json names them
        """
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or _is_named(token.content, literals, listed)
        }
        self._any_token = _one_of(token.content for token in added.values())
        self._control_token = _one_of(self._ids)
        self._opening = re.compile(rf"\A\s*(?:{self._control_token.pattern})")
        a_token = f"(?:{self._control_token.pattern})"
        self._run = re.compile(rf"{a_token}(?:\s*{a_token})*")
        firsts = sorted({content[0] for content in self._ids if content})
        self._first = _one_of(firsts)
        self._stand_ins = dict(zip(firsts, map(chr, _STAND_INS), strict=False))
        is_normalized = any(added[token_id].normalized for token_id in self._ids.values())
        self._normalizer = tokenizer.normalizer if is_normalized else None
        self._plain, self._true_ids = _matching_raw_text(tokenizer, self._stand_ins)

    def written_in(self, text: str, render: Callable[[T], str], messages: T) -> list[Span]:
        """Return where a rendered text has control tokens that a caller wrote.

        render    put the messages as the template does; it's called again with marked ones
        messages  texts within mappings, lists and tuples

        Raises  what render does; InvalidRequestError where the template looks so closely at a
                control token in a message that who wrote it can't be told
        """
        written = list(texts_within(messages))
        self._refuse_disguises(written)
        if not any(map(self._first.search, written)):
            return []
        marks = _Marks(written)
        tokens_written = [m.group() for w in written for m in self._control_token.finditer(w)]

        def marked_copy(spared: re.Pattern[str] | None, *, keep: bool = True) -> _Marked:
            return marks.read(render(_map_texts(messages, self._marker(marks, spared, keep=keep))))

        for spared in (self._opening, None):
            copy = marked_copy(spared)
            marked = _align(copy, text)
            if marked is not None:
                return list(self._written(marked))
            if not tokens_written and self._trusted(copy) == self._trusted(_Marked(text, [], [])):
                return []  # the template looks at how a message begins, ends or is long
        marked = _align(marked_copy(self._run), text)
        if marked is not None:
            # The template looks at what is between a message's tokens. Those that no longer stand
            # before their mark are gone if it writes the same tokens without all of them.
            marked = self._with_runs(marked, written)
            if self._trusted(marked) == self._trusted(marked_copy(self._run, keep=False)):
                return list(self._written(marked))
        raise InvalidRequestError(
            f"messages hold {shorten(tokens_written[0]) if tokens_written else 'parts'} of this "
            "model's control tokens where its chat template looks at them; leave them out",
            param="messages",
        )

    def encode(self, text: str, written: Sequence[Span]) -> list[int]:
        """Return a rendered text's tokens, with those in `written` as the letters they are.

        Raises  InvalidRequestError if the tokenizer makes control tokens of letters
        """
        tokenizer, true_ids = self._tokenizer, {}
        to_encode = text
        if written:
            tokenizer, true_ids = self._plain, self._true_ids
            to_encode = self._disguise(text, written)
        token_ids = encode(tokenizer, to_encode, add_special_tokens=False)
        if true_ids:
            token_ids = [true_ids.get(i, i) for i in token_ids]
        if written:
            self._check(token_ids, text, written)
        return token_ids

    def _refuse_disguises(self, written: Sequence[str]) -> None:
        """Refuse what the tokenizer's normalizer makes a control token of."""
        if self._normalizer is None:
            return
        find = self._control_token.findall
        for text in written:
            if len(find(self._normalizer.normalize_str(text))) > len(find(text)):
                raise InvalidRequestError(
                    "messages hold what this model's tokenizer normalizes to a control token; "
                    "leave it out",
                    param="messages",
                )

    def _marker(
        self, marks: "_Marks", spared: re.Pattern[str] | None, *, keep: bool
    ) -> Callable[[str], str]:
        """Return what marks a text.

        spared  what stays whole, with the mark behind it, for templates that ask what a message
                starts with, or whether there is something before a token or between two
        keep    leave it there; otherwise put nothing in place of it
        """

        def mark(text: str) -> str:
            pieces, done = [], 0
            for match in spared.finditer(text) if spared else ():
                pieces.append(self._first.sub(rf"{marks.start}\g<0>", text[done : match.start()]))
                if keep:
                    pieces += [match.group(), marks.end]
                done = match.end()
            pieces.append(self._first.sub(rf"{marks.start}\g<0>", text[done:]))
            return "".join(pieces)

        return mark

    def _with_runs(self, marked: "_Marked", written: Iterable[str]) -> "_Marked":
        """Return with an end behind each token of a written run that is before the run's mark.

        The time it takes is proportional to the texts: callers choose how many there are.
        """
        backwards: dict[str, Any] = {}  # the runs from their last tokens on, as a tree
        for text in written:
            for run in self._run.finditer(text):
                node = backwards
                for token in reversed(self._control_token.findall(run.group())):
                    node = node.setdefault(token, {})
        found = list(self._any_token.finditer(marked.text))
        at_end = {token.end(): number for number, token in enumerate(found)}
        ends: list[int] = []
        behind = 0  # the mark before, which no run goes beyond
        for end in sorted(set(marked.ends)):
            node, number, following = backwards, at_end.get(end, -1), end
            while number >= 0 and found[number].start() >= behind:
                token = found[number]
                if token.group() not in node or marked.text[token.end() : following].strip():
                    break
                ends.append(token.end())
                node, number, following = node[token.group()], number - 1, token.start()
            behind = end
        return _Marked(marked.text, marked.starts, ends)

    def _written(self, marked: "_Marked") -> Iterator[Span]:
        """Yield the spans of control tokens that have a mark."""
        starts, ends = sorted(marked.starts), set(marked.ends)
        for match in self._any_token.finditer(marked.text):
            start, end = match.span()
            at = bisect_left(starts, start)
            has_mark = at < len(starts) and starts[at] < end
            if match.group() in self._ids and (has_mark or end in ends):
                yield start, end

    def _trusted(self, marked: "_Marked") -> list[str]:
        """Return the control tokens that have no mark, in order."""
        written = set(self._written(marked))
        return [
            match.group()
            for match in self._any_token.finditer(marked.text)
            if match.group() in self._ids and match.span() not in written
        ]

    def _disguise(self, text: str, written: Sequence[Span]) -> str:
        """Return the text with stand-ins for what begins control tokens within the spans."""
        pieces, done = [], 0
        for start, end in written:
            hidden = self._first.sub(lambda m: self._stand_ins[m.group()], text[start:end])
            pieces += [text[done:start], hidden]
            done = end
        return "".join([*pieces, text[done:]])

    def _check(self, token_ids: Sequence[int], text: str, written: Sequence[Span]) -> None:
        """Refuse tokens among which are more of a control token than the template wrote."""
        spans = set(written)
        allowed = Counter(
            self._ids[match.group()]
            for match in self._any_token.finditer(text)
            if match.group() in self._ids and match.span() not in spans
        )
        control_ids = set(self._ids.values())
        if Counter(i for i in token_ids if i in control_ids) - allowed:
            start, end = written[0]
            raise InvalidRequestError(
                f"messages hold {shorten(text[start:end])}, which this model's tokenizer can't "
                "take as letters; leave it out",
                param="messages",
            )


class _Marked:
    """A text, and the places in it that marks were at: of starts and of ends of tokens."""

    __slots__ = ("ends", "starts", "text")

    def __init__(self, text: str, starts: Sequence[int], ends: Sequence[int]) -> None:
        self.text, self.starts, self.ends = text, starts, ends


class _Marks:
    """Two characters that no caller wrote."""

    def __init__(self, written: Iterable[str]) -> None:
        taken = "\0".join(written)
        unused = (
            char
            for char in map(chr, _PRIVATE_USE)
            if not any(form in taken for form in _forms_of(char))
        )
        self.start, self.end = next(unused), next(unused)
        self._marks = {form: mark for mark in (self.start, self.end) for form in _forms_of(mark)}
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self._marks))})")

    def read(self, text: str) -> _Marked:
        """Return the text without marks, and where they were."""
        pieces: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for number, piece in enumerate(self._pattern.split(text)):
            if number % 2:
                (starts if self._marks[piece] == self.start else ends).append(at)
            else:
                pieces.append(piece)
                at += len(piece)
        return _Marked("".join(pieces), starts, ends)


def _forms_of(mark: str) -> tuple[str, ...]:
    """Return the mark as it is, as JSON has it and as Python spells it."""
    return mark, json.dumps(mark)[1:-1], repr(mark)[1:-1]


def _align(marked: _Marked, text: str) -> _Marked | None:
    """Return the marks' places in the text if it differs from the marked one in white space alone.

    A template that strips a message doesn't strip what is behind a mark.
    """
    if marked.text == text:
        return marked
    if "".join(marked.text.split()) != "".join(text.split()):
        return None
    solid = [at for at, char in enumerate(text) if not char.isspace()]
    solid_before = {}
    num_solid = done = 0
    for position in sorted({*marked.starts, *marked.ends}):
        num_solid += len("".join(marked.text[done:position].split()))
        solid_before[position] = num_solid
        done = position
    return _Marked(
        text,
        [solid[solid_before[start]] for start in marked.starts],
        [solid[solid_before[end] - 1] + 1 for end in marked.ends],
    )


def _is_named(token: str, literals: str, listed: Collection[str] | None) -> bool:
    if listed is not None:
        return token in listed
    return token in literals and not token.isspace()


def _one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of the texts, the longest one first, as tokenizers match them."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def texts_within(value: Any) -> Iterator[str]:
    """Yield every text within mappings and sequences, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_within(list(value))
        yield from texts_within(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_within(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(k, change): _map_texts(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_texts(item, change) for item in value)
    return value


def _matching_raw_text(
    tokenizer: Tokenizer, stand_ins: Mapping[str, str]
) -> tuple[Tokenizer, dict[int, int]]:
    """Return a tokenizer that puts characters for stand-ins once it has matched added tokens.

    So a token that begins with a stand-in is not matched, and yet encoded as the letters it is,
    together with those around it. The model is shared. Added tokens may have other ids, which the
    mapping returned leads back.
    """
    copy = Tokenizer(tokenizer.model)
    normalizer = tokenizer.normalizer
    steps = [normalizers.Replace(stand_in, char) for char, stand_in in stand_ins.items()]
    copy.normalizer = normalizers.Sequence([*steps, *([normalizer] if normalizer else [])])
    if tokenizer.pre_tokenizer is not None:
        copy.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    copy.add_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=token.special,
            )
            for _, token in sorted(added.items())
        ]
    )
    own_ids = {token_id: copy.token_to_id(token.content) for token_id, token in added.items()}
    true_ids = {own: true for true, own in own_ids.items() if own is not None and own != true}
    return copy, true_ids
