"""Beginnings of functions from held-out files, for the evaluation to have completed."""

import ast
import random
from collections.abc import Iterator

from bitwatt.training.corpus import Document, load_corpus

NUM_PROMPTS = 200
_MIN_CHARACTERS, _MAX_CHARACTERS = 40, 600


def choose_prompts(limit: int = NUM_PROMPTS) -> list[dict[str, str]]:
    """Return the file and the beginning of `limit` functions, the same for the same Python.

    A beginning is the function's first lines, outdented, up to its docstring or its first
    statement, so that what follows is code.
    """
    found = [prompt for document in load_corpus().held_out for prompt in _prompts(document)]
    return random.Random(0).sample(found, limit)


def _prompts(document: Document) -> Iterator[dict[str, str]]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        first = node.body[0]
        chosen = lines[node.lineno - 1 : first.end_lineno]
        indent = node.col_offset
        text = "\n".join(line[indent:] for line in chosen) + "\n"
        if _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS and _parses(text):
            yield {"file": document.name, "prompt": text}


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
