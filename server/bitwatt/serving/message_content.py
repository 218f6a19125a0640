"""The content of a message as OpenAI's chat has it: a text, or a list of text parts."""

from collections.abc import Mapping
from typing import Any

from bitwatt.errors import InvalidRequestError, shorten

__all__ = ["text_of_content"]

_PARTS = ("text", "refusal")
"""The types of content parts, each of which has its text in a field of the same name."""


def text_of_content(content: object, refusal: object = None) -> str | None:
    """Return one text: parts are lines of it, and so is a refusal; None where neither is given.

    Raises  InvalidRequestError
    """
    if isinstance(content, list | tuple):
        text: str | None = "\n".join([_text_of_part(part) for part in content])
    elif content is None or isinstance(content, str):
        text = content
    else:
        raise _refusal("content must be a string or a list of text parts")
    if isinstance(refusal, str) and refusal:
        return f"{text}\n{refusal}" if text else refusal
    return text


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PARTS:
        raise _refusal(f"content parts of type {shorten(kind)} are not supported; only text is")
    text = part.get(kind)
    if not isinstance(text, str):
        raise _refusal(f"a content part of type {kind} has a string {kind}")
    return text


def _refusal(told: str) -> InvalidRequestError:
    return InvalidRequestError(told, param="content")
