"""The items of a response's output, from the pieces of an answer, and the events that tell them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from bitwatt.api.schemas.response_events import (
    AnyResponseEvent,
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    ItemEvent,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningDelta,
    ReasoningDone,
    ReasoningText,
    TextDelta,
    TextDone,
)
from bitwatt.text.answers.pieces import (
    AnswerPiece,
    CallArguments,
    CallClosed,
    CallOpened,
    Content,
    Reasoning,
)

__all__ = ["ResponseItems"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of item.

    prefix  of its ids
    events  what the types of its events begin with
    part    what its text is a part of; None where the item has the text itself
    """

    prefix: str
    events: str
    item: type[Any]
    part: type[Any] | None = None
    delta: type[Any]
    done: type[Any]


_REASONING = _Kind(
    prefix="rs",
    events="response.reasoning_text",
    item=OutputReasoning,
    part=ReasoningText,
    delta=ReasoningDelta,
    done=ReasoningDone,
)
_MESSAGE = _Kind(
    prefix="msg",
    events="response.output_text",
    item=OutputMessage,
    part=OutputText,
    delta=TextDelta,
    done=TextDone,
)
_CALL = _Kind(
    prefix="fc",
    events="response.function_call_arguments",
    item=OutputCall,
    delta=ArgumentsDelta,
    done=ArgumentsDone,
)


@dataclass(slots=True)
class _OpenItem:
    """An item while it comes.

    own    fields that it alone has
    texts  what has come of it
    """

    kind: _Kind
    output_index: int
    own: dict[str, str]
    texts: list[str] = field(default_factory=list)
    id: str = field(init=False)
    place: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.kind.prefix}_{token_hex(24)}"
        self.place = {"item_id": self.id, "output_index": self.output_index}
        if self.kind.part is not None:
            self.place["content_index"] = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def as_sent(self, status: ItemStatus) -> OutputItem:
        """Return the item with its text so far; with no part yet where it only begins."""
        part = self.kind.part
        if part is None:
            text: dict[str, Any] = {"arguments": self.text}
        else:
            text = {"content": [] if status == "in_progress" else [part(text=self.text)]}
        item: OutputItem = self.kind.item(id=self.id, status=status, **self.own, **text)
        return item


class ResponseItems:
    """Puts one answer's pieces into items, one after the other."""

    def __init__(self, namespaced: Mapping[str, Mapping[str, str]]) -> None:
        """Begin.

        namespaced  what the items of some calls say in place of the name
        """
        self._namespaced = namespaced
        self._num_events = 0
        self._ended: list[OutputItem] = []
        self._open: _OpenItem | None = None

    def numbered(self, kind: str) -> dict[str, Any]:
        """Return what every event of the stream has: its type, and its number."""
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number}

    def so_far(self) -> list[OutputItem]:
        """Return the items that have ended, and the last one as far as it has come."""
        return [*self._ended, *([self._open.as_sent("incomplete")] if self._open else [])]

    def push(self, pieces: Sequence[AnswerPiece]) -> Iterator[AnyResponseEvent]:
        """Yield the events of what is new."""
        for piece in pieces:
            match piece:
                case Content(text):
                    yield from self._extend(_MESSAGE, text)
                case Reasoning(text):
                    yield from self._extend(_REASONING, text)
                case CallOpened(_, name):
                    own = self._namespaced.get(name, {"name": name})
                    yield from self._begin(_CALL, call_id=f"call_{token_hex(12)}", **own)
                case CallArguments(_, text):
                    yield from self._extend(_CALL, text)
                case CallClosed(_, is_cut):
                    yield from self._close("incomplete" if is_cut else "completed")

    def finish(self, *, is_cut: bool) -> Iterator[AnyResponseEvent]:
        """Yield the events of the end, with an empty message where the answer said nothing."""
        if self._open is None and not self._ended:
            yield from self._begin(_MESSAGE)
        yield from self._close("incomplete" if is_cut else "completed")

    def _extend(self, kind: _Kind, text: str) -> Iterator[AnyResponseEvent]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        opened = self._open
        assert opened is not None
        opened.texts.append(text)
        yield kind.delta(**self.numbered(f"{kind.events}.delta"), **opened.place, delta=text)

    def _begin(self, kind: _Kind, **own: str) -> Iterator[AnyResponseEvent]:
        yield from self._close("completed")
        opened = self._open = _OpenItem(kind, len(self._ended), own)
        yield self._item_event("response.output_item.added", opened, opened.as_sent("in_progress"))
        if kind.part is not None:
            yield self._part_event("response.content_part.added", opened)

    def _close(self, status: ItemStatus) -> Iterator[AnyResponseEvent]:
        opened, self._open = self._open, None
        if opened is None:
            return
        kind, text = opened.kind, opened.text
        item = opened.as_sent(status)
        self._ended.append(item)
        whole = {"arguments" if kind.part is None else "text": text}
        yield kind.done(**self.numbered(f"{kind.events}.done"), **opened.place, **whole)
        if kind.part is not None:
            yield self._part_event("response.content_part.done", opened)
        yield self._item_event("response.output_item.done", opened, item)

    def _item_event(self, kind: str, opened: _OpenItem, item: OutputItem) -> ItemEvent:
        return ItemEvent(**self.numbered(kind), output_index=opened.output_index, item=item)

    def _part_event(self, kind: str, opened: _OpenItem) -> ContentPartEvent:
        assert opened.kind.part is not None
        part = opened.kind.part(text=opened.text)
        return ContentPartEvent(**self.numbered(kind), **opened.place, part=part)
