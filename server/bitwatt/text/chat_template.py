"""A model's own chat template, rendered in a sandbox."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitwatt.errors import CheckpointError, InvalidRequestError

__all__ = ["ALLOWED_KWARGS", "ChatTemplate"]

ALLOWED_KWARGS = frozenset({"enable_thinking", "thinking"})
"""What a request may pass to a template."""

_MAX_CHARS = 16 * 1024 * 1024


class ChatTemplate:
    """Turns messages into the model's prompt.

    The template comes with the model and runs sandboxed: it reaches no attribute of Python's own,
    changes nothing, and is given up after a time limit or 16 Mi characters. Safe in any thread.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile the template; special_tokens are its bos_token, eos_token and so on.

        Raises  CheckpointError if it doesn't compile
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template doesn't compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        kwargs: Mapping[str, Any],
        time_limit_s: float,
    ) -> str:
        """Return the prompt; blocks, so call it off the event loop.

        Raises  InvalidRequestError if the template refuses the messages or takes too long
        """
        deadline = time.monotonic() + time_limit_s
        context = {**kwargs, **self._special_tokens}
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(messages=messages, **context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > _MAX_CHARS or time.monotonic() > deadline:
                    raise InvalidRequestError(
                        f"the chat template took more than {time_limit_s:g} s or "
                        f"{_MAX_CHARS} characters for these messages",
                        param="messages",
                    )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from error
        return "".join(pieces)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
