"""A model's own chat template, rendered in a sandbox."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import nodes

from bitwatt.errors import CheckpointError, InvalidRequestError, shorten
from bitwatt.text.template_sandbox import TemplateSandbox

__all__ = ["EFFORT", "SWITCHES", "ChatTemplate", "checked_kwargs", "effort_kwargs"]

SWITCHES = frozenset({"enable_thinking", "thinking"})
"""What a request may tell a template, true or false."""

EFFORT = "reasoning_effort"
_LEVELS = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}

_MAX_SOURCE_CHARS = 4 * 1024 * 1024


class ChatTemplate:
    """Turns messages into the model's prompt, as transformers does. Safe in any thread.

    The template comes with the model: template_sandbox.py says what holds it.

    literals     every piece of text that the template itself holds, joined by NUL
    takes_tools  whether it looks at the tools that it is given
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile the template; special_tokens are its bos_token, eos_token and so on.

        Raises  CheckpointError of one line if it doesn't compile
        """
        self._sandbox = TemplateSandbox()
        try:
            if len(source) > _MAX_SOURCE_CHARS:
                raise ValueError(f"it has {len(source)} characters; {_MAX_SOURCE_CHARS} are taken")
            source.encode()
            tree = self._sandbox.parse(source)
            self.literals = "\0".join(_literals(tree))
            self.takes_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
            self._template = self._sandbox.from_string(tree)
        except Exception as error:  # a deep one exceeds Python's own limits, each of another type
            raise CheckpointError(
                f"the chat template doesn't compile: {_one_line(error)}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        kwargs: Mapping[str, Any],
        time_limit_s: float,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Return the prompt; blocks, so call it off the event loop.

        time_limit_s  of processor time, so that a busy machine refuses no one
        now           what strftime_now is told

        Raises  InvalidRequestError if the template refuses the messages or takes too much
        """
        context = {
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
            **kwargs,
        }
        with self._sandbox.rendering(time_limit_s, now or datetime.now()), _refusals():
            return self._sandbox.concat(self._template.generate(messages=messages, **context))


def effort_kwargs(effort: str) -> dict[str, bool | str]:
    """Return what templates are told of an effort: nothing of one that isn't known.

    Templates that know efforts have three. "none" turns thinking off.
    """
    effort = effort.strip().lower()
    if effort in ("none", "off"):
        return dict.fromkeys(SWITCHES, False)
    level = _LEVELS.get(effort)
    return {} if level is None else {**dict.fromkeys(SWITCHES, True), EFFORT: level}


def checked_kwargs(given: Mapping[str, Any]) -> dict[str, bool | str]:
    """Return what a request tells a template, in its words; raises InvalidRequestError."""
    told: dict[str, bool | str] = {}
    for name, value in given.items():
        if name == EFFORT and isinstance(value, str):
            told |= {key: said for key, said in effort_kwargs(value).items() if key == EFFORT}
        elif name in SWITCHES and isinstance(value, bool):
            told[name] = value
        else:
            raise InvalidRequestError(
                f"chat_template_kwargs has {shorten(name)}: {shorten(value)}; allowed are "
                f"{', '.join(sorted(SWITCHES))}, true or false, and {EFFORT}, a string",
                param="chat_template_kwargs",
            )
    return told


def _literals(tree: nodes.Template) -> Iterator[str]:
    for data in tree.find_all(nodes.TemplateData):
        yield data.data
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever the template raises into an InvalidRequestError."""
    try:
        yield
    except Exception as error:  # a template may raise anything that Python's operators do
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {_one_line(error)}",
            param="messages",
        ) from error


def _one_line(error: Exception) -> str:
    """Return the error's message, or its type where it has none, never more than a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
