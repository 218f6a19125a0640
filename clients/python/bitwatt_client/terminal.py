"""Text for a person's terminal, which it can't command."""

import re

__all__ = ["duration", "plural", "printable"]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Return the text with control characters but newline and tab spelled out: ESC as \x1b.

    What a model says could else move the cursor, set a title, or type into the terminal.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def plural(number: int, noun: str) -> str:
    """Return the number with its noun, which takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Return whole seconds in words: 41 s, 2 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
