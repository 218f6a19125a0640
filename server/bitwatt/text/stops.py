"""Ends a text at the first stop string, though it spans tokens."""

from collections.abc import Sequence

__all__ = ["StopMatcher", "start_of_partial"]


class StopMatcher:
    """Passes a text on up to the first stop string.

    The pieces returned by push and finish, joined, are the text before the stop string that
    completes first (of two that complete together, the longer one), or the whole text. What could
    be the start of a stop string is held back until the text decides.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """Match these strings, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that was met

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; what follows is dropped."""
        return self.matched is not None

    @property
    def holds_back(self) -> bool:
        """Whether text waits that may be a stop string's beginning."""
        return bool(self._held)

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Return what of the text so far is certain to come before any stop string.

        may_stop  whether one that completes here ends the text; else it is text
        """
        if self.matched is not None or not text:
            return ""
        text = self._held + text
        if may_stop:
            end, start = min(
                ((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0),
                default=(-1, -1),
            )
            if end >= 0:
                self.matched = text[start:end]
                self._held = ""
                return text[:start]
        cut = min((start_of_partial(text, stop) for stop in self._stops), default=len(text))
        self._held = text[cut:]
        return text[:cut]

    def stop(self, matched: str) -> str:
        """Return what was held back, as a stop that isn't of the text ends it here."""
        self.matched = matched
        return self.finish()

    def finish(self) -> str:
        """Return what was held back; no more text comes."""
        held, self._held = self._held, ""
        return held


def start_of_partial(text: str, stop: str) -> int:
    """Return where the longest start of `stop` that ends the text begins, else the text's end."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)
