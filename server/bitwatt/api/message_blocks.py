"""The blocks of a message, from the pieces of an answer, and the events that tell of them."""

from collections.abc import Iterator, Sequence
from secrets import token_hex
from typing import Any

from pydantic_core import from_json

from bitwatt.api.schemas.message_events import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    JsonPiece,
    MessageEvent,
    SignaturePiece,
    TextBlock,
    TextPiece,
    ThinkingBlock,
    ThinkingPiece,
    ToolUseBlock,
)
from bitwatt.text.answers.pieces import (
    AnswerPiece,
    CallArguments,
    CallClosed,
    CallOpened,
    Content,
    Reasoning,
)

__all__ = ["SIGNATURE", "MessageBlocks"]

SIGNATURE = "unsigned"
"""Of every thinking block. Clients send back such blocks alone that have one."""


class MessageBlocks:
    """Puts one answer's pieces into blocks, one after the other.

    ended       those that have
    has_called  whether some are calls, and all of these are whole
    """

    def __init__(self, *, tells_thinking: bool) -> None:
        """Begin; without tells_thinking, the text of thinking blocks is left out."""
        self.ended: list[Block] = []
        self.has_called = False
        self._tells_thinking = tells_thinking
        self._open: Block | None = None  # as it began
        self._texts: list[str] = []

    def push(self, pieces: Sequence[AnswerPiece]) -> Iterator[MessageEvent]:
        """Yield the events of what is new."""
        for piece in pieces:
            match piece:
                case Content(text):
                    if not isinstance(self._open, TextBlock):
                        yield from self._begin(TextBlock(text=""))
                    yield self._more(text, TextPiece(text))
                case Reasoning(text):
                    if not isinstance(self._open, ThinkingBlock):
                        yield from self._begin(ThinkingBlock(thinking="", signature=""))
                    if self._tells_thinking:
                        yield self._more(text, ThinkingPiece(text))
                case CallOpened(_, name):
                    tool_use = ToolUseBlock(id=f"toolu_{token_hex(12)}", name=name, input={})
                    yield from self._begin(tool_use)
                case CallArguments(_, text):
                    yield self._more(text, JsonPiece(text))
                case CallClosed(_, is_cut):  # its block ends where the next one begins
                    self.has_called = not is_cut

    def finish(self) -> Iterator[MessageEvent]:
        """Yield the events of the end."""
        opened, text = self._open, "".join(self._texts)
        if opened is None:
            return
        index = len(self.ended)
        match opened:
            case TextBlock():
                self.ended.append(TextBlock(text=text))
            case ThinkingBlock():
                self.ended.append(ThinkingBlock(thinking=text, signature=SIGNATURE))
                yield BlockDelta(index, SignaturePiece(SIGNATURE))
            case ToolUseBlock(id=call_id, name=name):
                self.ended.append(ToolUseBlock(id=call_id, name=name, input=_input_of(text)))
        self._open, self._texts = None, []
        yield BlockStop(index)

    def _begin(self, block: Block) -> Iterator[MessageEvent]:
        yield from self.finish()
        self._open = block
        yield BlockStart(len(self.ended), block)

    def _more(self, text: str, piece: TextPiece | ThinkingPiece | JsonPiece) -> MessageEvent:
        self._texts.append(text)
        return BlockDelta(len(self.ended), piece)


def _input_of(arguments: str) -> dict[str, Any]:
    """Return a call's input: as far as it came where it was cut.

    What is no object stands under `raw_arguments`, for input is one.
    """
    try:
        parsed = from_json(arguments, allow_partial="trailing-strings") if arguments else {}
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"raw_arguments": arguments}
