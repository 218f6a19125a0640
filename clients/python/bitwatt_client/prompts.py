"""The prompts a comparison replays unless it is given others."""

import json
from pathlib import Path

__all__ = ["DEFAULT_PROMPTS", "read_prompts"]

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


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return a file's prompts: one a line, or in a .jsonl file the "prompt" of each line.

    Raises  ValueError naming the line that has no prompt, or the file that has no line
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        prompt = _prompt_of(line) if path.suffix == ".jsonl" else line
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{path}, line {number}: no "prompt" that is a string')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return tuple(prompts)


def _prompt_of(line: str) -> object:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("prompt") if isinstance(entry, dict) else None
