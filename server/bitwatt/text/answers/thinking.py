"""Tells a model's thinking from its answer: what stands between two marks, before anything else."""

from typing import Literal

from bitwatt.text.stops import start_of_partial

__all__ = ["ThinkingPart", "ThinkingSplitter"]

ThinkingPart = Literal["may come", "open", "over"]
"""Where an answer begins: before thinking that may come, within it, or behind it."""


class ThinkingSplitter:
    """Splits a text as it comes. White space beside the marks belongs to neither part.

    part  where the text is now
    """

    __slots__ = ("_close", "_has_begun", "_held", "_open", "part")

    def __init__(self, opening: str, closing: str, part: ThinkingPart = "may come") -> None:
        """Begin, with the part that the prompt leads into."""
        self._open, self._close = opening, closing
        self._held = ""
        self._has_begun = part == "over"  # the part's text, whose first white space is dropped
        self.part = part

    def push(self, text: str) -> tuple[str, str]:
        """Return what is certain of the thinking, and of what comes behind it."""
        if self.part == "over" and self._has_begun:
            return "", text
        self._held += text
        if self.part == "may come":
            begun = self._held.lstrip()
            if self._open.startswith(begun):
                if begun != self._open:
                    return "", ""
            elif not begun.startswith(self._open):
                self.part, self._has_begun = "over", True
                return "", self._take(len(self._held))
            self.part, self._held = "open", begun.removeprefix(self._open)
        thinking = self._push_thinking() if self.part == "open" else ""
        if self.part == "open":
            return thinking, ""
        self._drop_white_space()
        return thinking, self._take(len(self._held))

    def finish(self) -> tuple[str, str]:
        """Return the rest; no more text comes."""
        held = self._take(len(self._held))
        return (held.rstrip(), "") if self.part == "open" else ("", held)

    def _push_thinking(self) -> str:
        self._drop_white_space()
        at = self._held.find(self._close)
        if at < 0:
            certain = self._held[: start_of_partial(self._held, self._close)].rstrip()
            return self._take(len(certain))
        thinking = self._take(at).rstrip()
        self._held = self._held[len(self._close) :]
        self.part, self._has_begun = "over", False
        return thinking

    def _drop_white_space(self) -> None:
        if not self._has_begun:
            self._held = self._held.lstrip()
            self._has_begun = bool(self._held)

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken
