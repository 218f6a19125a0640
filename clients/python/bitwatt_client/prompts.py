"""The prompts a comparison replays unless it is given others, and files of others."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["DEFAULT_PROMPTS", "Line", "read_prompts", "read_texts"]

DEFAULT_PROMPTS = (
    "What does the function os.path.join do?",
    "Write a function that returns the largest of three numbers.",
    "How do I read a text file line by line?",
    "Explain what a generator is, in two sentences.",
    "What is the difference between a list and a tuple?",
    "Write a class for a stack with push and pop.",
    "What does json.dumps return?",
    "How do I sort a dictionary by its values?",
    "Explain what a context manager is for.",
    "Write a function that counts the words of a string.",
    "What does the method str.partition do?",
    "How do I run a subprocess and read its output?",
    "What is an exception, and when is it raised?",
    "Write a decorator that prints how long a function took.",
    "What does itertools.groupby need of its input?",
    "How do I parse the arguments of a command line?",
)


class Line(NamedTuple):
    """A line of a file, and the text it gives."""

    number: int
    text: str


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return a file's prompts: one a line, or in a .jsonl file the "prompt" of each line.

    Raises  ValueError naming the line that has no prompt, or the file that has no line
    """
    return tuple(line.text for line in _read(path, ("prompt",)))


def read_texts(path: Path) -> tuple[Line, ...]:
    """Return a file's texts: one a line, or in a .jsonl file the "prompt" or "text" of each line.

    Raises  ValueError as `read_prompts`
    """
    return tuple(_read(path, ("prompt", "text")))


def _read(path: Path, keys: Sequence[str]) -> list[Line]:
    lines = []
    # Lines of bytes: a text in JSON may have the other ends of lines that Unicode knows.
    for number, written in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = written.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not UTF-8") from error
        if not line.strip():
            continue
        text = _text_of(line, keys) if path.suffix == ".jsonl" else line
        if not isinstance(text, str) or not text.strip():
            named = " or ".join(f'"{key}"' for key in keys)
            raise ValueError(f"{path}, line {number}: no {named} that is a string with text")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{path}, line {number}: has half a character (\\ud800 to \\udfff)")
        lines.append(Line(number, text))
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def _text_of(line: str, keys: Sequence[str]) -> object:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    return next((entry[key] for key in keys if key in entry), None)
