"""Anthropic's own types. Imported by the tests that use them: that takes over a second."""

from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

__all__ = ["as_event", "as_message"]

_EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def as_message(text: str) -> Message:
    """Return the message that a whole answer is; it raises where it isn't one."""
    return Message.model_validate_json(text, strict=True)


def as_event(data: str) -> Any:
    """Return the event of a stream; it raises where it isn't one."""
    return _EVENTS.validate_json(data, strict=True)
