"""Beginnings of Python from held-out files, and whether a completion of one parses."""

import ast
import json
import warnings
from functools import cache
from pathlib import Path

PROMPTS_FILE = Path(__file__).parent / "prompts.jsonl"
MAX_TOKENS = 64


@cache
def load_prompts() -> tuple[str, ...]:
    """Return the 200 committed beginnings; each ends with a line that opens a function."""
    lines = PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines)


def save_prompts(prompts: list[dict[str, str]]) -> None:
    """Write the beginnings, each with the file it is from, a line each."""
    lines = [json.dumps(prompt) + "\n" for prompt in prompts]
    PROMPTS_FILE.write_text("".join(lines), encoding="utf-8")


def parses(prompt: str, completion: str) -> bool:
    """Say whether the prompt with what follows is Python.

    A completion cut off by its length ends anywhere, so lines are dropped from its end until the
    text parses; at least one has to stay, and no more than one statement may go: what is dropped
    must be the beginning of something that could parse.
    """
    text = prompt + completion
    lines = text.splitlines(keepends=True)
    if not text.endswith("\n"):
        lines.pop()
    first = prompt.count("\n")
    for end in range(len(lines), first, -1):
        if _parses("".join(lines[:end])):
            return end == len(lines) or _is_incomplete("".join(lines))
    return False


def _parses(text: str) -> bool:
    return _error(text, 0) is None


def _is_incomplete(text: str) -> bool:
    error = _error(text, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | _ALLOW_INCOMPLETE_INPUT)
    return error is None or "incomplete" in error or "was never closed" in error


_ALLOW_INCOMPLETE_INPUT = 0x4000  # CPython's PyCF_ALLOW_INCOMPLETE_INPUT, as `codeop` uses it


def _error(text: str, flags: int) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<completion>", "exec", flags | ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return None
