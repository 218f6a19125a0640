"""Answers on a terminal: Markdown as it comes, and two side by side."""

import io
import re

import pytest
from bitwatt_client.chat_views import MarkdownView, PlainView, SidesView, new_view, split_blocks
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

MARKDOWN = """# Title

Some *text* of
two lines.

```python
def f():

    return 1
```

- one
- two

[x](http://evil.example) end"""


def make_console(width=60):
    return Console(
        file=io.StringIO(), width=width, height=20, force_terminal=True, color_system=None
    )


def shown(console):
    """Return what stands on the terminal at the end: what was drawn over is gone."""
    rows, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", console.file.getvalue()):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\r":
            column = 0
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[2K":
            rows[row] = ""
        elif not part.startswith("\x1b"):
            kept = rows[row].ljust(column)
            rows[row] = kept[:column] + part + kept[column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in rows)


def test_an_answer_that_comes_in_pieces_looks_as_one_that_came_whole():
    looks = []
    for size in (1, 7, len(MARKDOWN)):
        console = make_console()
        view = MarkdownView(console)
        for start in range(0, len(MARKDOWN), size):
            view.push(0, MARKDOWN[start : start + size])
        view.end()
        looks.append([line for line in shown(console).splitlines() if line.strip()])
    assert looks[0] == looks[1] == looks[2]
    text = "\n".join(looks[0])
    assert "Some text of two lines." in text
    assert "```" not in text
    assert " • one" in text
    assert "\x1b]8" not in console.file.getvalue()  # no link that hides where it leads


@given(st.text(alphabet="a`~ \n#-", max_size=60))
def test_blocks_are_parts_of_the_text_and_no_fence_is_cut(text):
    whole, rest = split_blocks(text)
    assert whole + rest == text
    again, _ = split_blocks(whole + rest + "more")
    assert again.startswith(whole)


def test_a_fence_with_an_empty_line_is_one_block():
    assert split_blocks("a\n\n```\nb\n\nc") == ("a\n\n", "```\nb\n\nc")
    assert split_blocks("```\nb\n\nc\n```\n\nd") == ("```\nb\n\nc\n```\n\n", "d")


def test_two_answers_stand_side_by_side_under_their_names():
    console = make_console()
    view = SidesView(console, ["left", "right"])
    for word in ("the ", "quick ", "brown ", "fox " * 12):
        view.push(0, word)
    view.push(1, "short\x1b[2J")
    view.end()
    lines = [line for line in shown(console).splitlines() if line.strip()]
    assert re.fullmatch(r"left +right", lines[0])
    assert re.fullmatch(r"the quick brown fox fox .* short\\x1b\[2J", lines[1])
    assert "fox" in lines[2]
    assert "short" not in "".join(lines[2:])


def test_no_terminal_gets_no_marks_of_one():
    out = io.StringIO()
    assert isinstance(new_view(out, ["m"], is_terminal=False, markdown=True), PlainView)
    assert isinstance(new_view(out, ["m"], is_terminal=True, markdown=False), PlainView)
    assert isinstance(new_view(out, ["m"], is_terminal=True, markdown=True), MarkdownView)
    two = new_view(out, ["a", "b"], is_terminal=True, markdown=False)
    assert isinstance(two, SidesView)
    two.end()


def test_without_rich_a_terminal_gets_plain_text(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    out = io.StringIO()
    view = new_view(out, ["m"], is_terminal=True, markdown=True)
    assert isinstance(view, PlainView)
    view.push(0, "**a**")
    view.end()
    assert out.getvalue() == "**a**"


@pytest.mark.parametrize("text", ["", "\n\n", "a"])
def test_an_answer_without_text_is_shown_too(text):
    console = make_console()
    view = MarkdownView(console)
    view.push(0, text)
    view.end()
    assert shown(console).strip() == text.strip()
