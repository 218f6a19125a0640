"""How answers are shown as they come: plain, as Markdown, or two side by side."""

import re
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from bitwatt_client.terminal import printable

__all__ = ["AnswerView", "MarkdownView", "PlainView", "SidesView", "new_view"]

_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_COLUMN_GAP = 3


class AnswerView(Protocol):
    """Shows one answer of each model; none of them can command the terminal."""

    def push(self, side: int, text: str) -> None:
        """Show what is new of a model's answer."""

    def end(self) -> None:
        """Show the rest: every answer has ended, or was broken off."""


def new_view(out: TextIO, names: Sequence[str], *, is_terminal: bool, markdown: bool) -> AnswerView:
    """Return the view for these models; without Rich, or on no terminal, it is a plain one."""
    try:
        from rich.console import Console
    except ImportError:
        is_terminal = False
    if not is_terminal or not (markdown or len(names) > 1):
        return PlainView(out, names)
    console = Console(file=out, highlight=False)
    return MarkdownView(console) if len(names) == 1 else SidesView(console, names)


class PlainView:
    """Writes text as it comes; of several models, each under its name once all have ended."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self._out = out
        self._names = names
        self._texts = [""] * len(names)

    def push(self, side: int, text: str) -> None:
        """Write it; or keep it, of several models."""
        if len(self._names) == 1:
            self._out.write(printable(text))
            self._out.flush()
        else:
            self._texts[side] += text

    def end(self) -> None:
        """Write what was kept."""
        if len(self._names) == 1:
            return
        told = (f"{name}: {text}" for name, text in zip(self._names, self._texts, strict=True))
        self._out.write(printable("\n\n".join(told)))
        self._out.flush()


class MarkdownView:
    """Renders each block of Markdown (CommonMark) for good once it is whole.

    The block under way is drawn anew with each piece, cut to the lines that the terminal has.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self._live: Any = None
        self._rest = ""
        self._has_printed = False

    def push(self, side: int, text: str) -> None:  # noqa: ARG002 - there is one
        """Show it."""
        self._rest += printable(text)
        whole, self._rest = split_blocks(self._rest)
        if whole:
            self._pause()
            self._print(whole)
        if self._rest.strip():
            if self._live is None:
                self._live = _new_live(self._console)
            self._live.update(_markdown(self._rest), refresh=True)

    def end(self) -> None:
        """Render the last block."""
        self._pause()
        if self._rest.strip():
            self._print(self._rest)
        self._rest = ""

    def _pause(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None  # one that is started again would draw over what came between

    def _print(self, text: str) -> None:
        if self._has_printed:
            self._console.print()
        self._console.print(_markdown(text))
        self._has_printed = True


class SidesView:
    """Shows two answers in columns; the whole of them once both have ended."""

    def __init__(self, console: Any, names: Sequence[str]) -> None:
        self._console = console
        self._names = names
        self._texts = [""] * len(names)
        self._live = _new_live(console)

    def push(self, side: int, text: str) -> None:
        """Show the last lines that the terminal has room for."""
        self._texts[side] += printable(text)
        self._live.update(self._columns(max(3, self._console.height - 3)), refresh=True)

    def end(self) -> None:
        """Print both whole."""
        self._live.stop()
        self._console.print(self._columns(None))

    def _columns(self, num_lines: int | None) -> Any:
        from rich.table import Table
        from rich.text import Text

        width = self._console.width // len(self._names) - _COLUMN_GAP
        table = Table(box=None, padding=(0, _COLUMN_GAP, 0, 0), expand=True)
        cells = []
        for name, text in zip(self._names, self._texts, strict=True):
            table.add_column(Text(printable(name)), ratio=1, overflow="fold")
            lines = Text(text).wrap(self._console, width)
            cells.append(Text("\n").join(lines if num_lines is None else lines[-num_lines:]))
        table.add_row(*cells)
        return table


def _new_live(console: Any) -> Any:
    """Return what is drawn anew in place, and leaves nothing when it stops."""
    from rich.live import Live

    live = Live(console=console, transient=True, auto_refresh=False)
    live.start()
    return live


def _markdown(text: str) -> Any:
    from rich.markdown import Markdown

    return Markdown(text, hyperlinks=False)


def split_blocks(text: str) -> tuple[str, str]:
    """Return the blocks that no further text can change, and the rest.

    A block ends at an empty line outside of a fence. Lists and quotes go on behind one, and so they
    are rendered in parts: what is shown is the same.
    """
    end = 0
    for found in re.finditer(r"\n[ \t]*\n+", text):
        if len(_FENCE.findall(text[: found.start() + 1])) % 2 == 0 and found.end() < len(text):
            end = found.end()
    return text[:end], text[end:]
