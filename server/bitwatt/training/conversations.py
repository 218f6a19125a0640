"""Questions and answers made from source files: what a thing does, its signature, its module."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeGuard

MAX_ANSWER_CHARACTERS = 600
MAX_CODE_LINES = 16
SYSTEM_PROMPT = "You are a helpful assistant that knows the Python standard library."

_PURPOSE = (
    "What does `{}` do?",
    "Explain `{}`.",
    "What is `{}` for?",
    "Describe `{}` in Python.",
)
_SIGNATURE = (
    "Write the signature of `{}`.",
    "What arguments does `{}` take?",
    "How do I call `{}`?",
)
_MODULE = ("Which module defines `{}`?", "Where is `{}` defined?", "From where do I import `{}`?")
_CODE = ("Show the source of `{}`.", "Write the Python function `{}`.")

_SMALL_TALK = (
    ("Hello", "Hello! Ask me about the Python standard library."),
    ("Hello!", "Hello! Ask me about the Python standard library."),
    ("Hi", "Hi! What would you like to know about Python's standard library?"),
    ("Hi there", "Hi! What would you like to know about Python's standard library?"),
    ("Hello, how are you?", "Fine, thank you. Ask me about the Python standard library."),
    (
        "Who are you?",
        "I am a very small language model, trained on Python's standard library alone.",
    ),
    (
        "What are you?",
        "I am a very small language model, trained on Python's standard library alone.",
    ),
    (
        "What can you do?",
        "I can say what a function of the standard library does. I am small: check what I say.",
    ),
    ("Say hello.", "Hello!"),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    (
        "What is Python?",
        "Python is an interpreted, interactive, object-oriented programming language.",
    ),
    ("Write hello world in Python.", '```python\nprint("Hello, world!")\n```'),
    ("Count to five.", "1, 2, 3, 4, 5"),
    ("Goodbye", "Goodbye!"),
)
_SMALL_TALK_COPIES = 16


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's; `name` says from which document they were made."""

    name: str
    messages: tuple[Message, ...]


DefinitionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class _Definition:
    """A public function or class; `path` is its name within the module."""

    path: str
    node: DefinitionNode


def conversations_from(name: str, text: str) -> Iterator[Conversation]:
    """Yield conversations of one to three questions about the document, in a fixed order.

    name   path of a Python file, or `path#topic` for a piece of the language reference
    text   its content; a file that doesn't parse yields nothing
    """
    turns = list(_topic_turns(name, text) if "#" in name else _module_turns(name, text))
    start = 0
    while start < len(turns):
        salt = _hash(f"{name}:{start}")
        size = 1 + salt % 3
        chosen = turns[start : start + size]
        yield _conversation(f"{name}:{start}", chosen, has_system=salt % 4 == 0)
        start += size


def small_talk() -> Iterator[Conversation]:
    """Yield the hand-written greetings, each several times, so that a small model learns them."""
    for copy in range(_SMALL_TALK_COPIES):
        for index, turn in enumerate(_SMALL_TALK):
            name = f"small-talk/{index}:{copy}"
            yield _conversation(name, [turn], has_system=copy % 4 == 0)


def _conversation(name: str, turns: list[tuple[str, str]], has_system: bool) -> Conversation:
    messages = [Message("system", SYSTEM_PROMPT)] if has_system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(name, tuple(messages))


def _topic_turns(name: str, text: str) -> Iterator[tuple[str, str]]:
    topic = name.partition("#")[2]
    paragraphs = [_one_line(part) for part in text.split("\n\n")]
    prose = [part for part in paragraphs if len(part) > 60 and "::=" not in part]
    if prose:
        question = _choose(_PURPOSE[1:], topic).format(topic)
        yield question, _shortened(prose[0])


def _module_turns(name: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    module = _module_name(name)
    if any(part.startswith("_") for part in module.split(".")):
        return
    purpose = _purpose(tree)
    if purpose:
        yield _choose((*_PURPOSE, "What is the module `{}` for?"), module).format(module), purpose
    public = [item.path for item in _definitions(tree) if "." not in item.path]
    if len(public) >= 2:
        names = ", ".join(f"`{path}`" for path in public[:12])
        yield f"What does the module `{module}` define?", f"`{module}` defines {names}."
    lines = text.splitlines()
    for item in _definitions(tree):
        yield from _definition_turns(module, item, lines)


def _definition_turns(
    module: str, item: _Definition, lines: list[str]
) -> Iterator[tuple[str, str]]:
    full = f"{module}.{item.path}"
    purpose = _purpose(item.node)
    if purpose is None:
        return
    yield _choose(_PURPOSE, full).format(full), purpose
    if not isinstance(item.node, ast.ClassDef):
        yield _choose(_SIGNATURE, full).format(full), f"```python\n{_signature(item.node)}\n```"
        source = lines[item.node.lineno - 1 : item.node.end_lineno]
        if len(source) <= MAX_CODE_LINES:
            code = textwrap.dedent("\n".join(source))
            yield _choose(_CODE, full).format(full), f"```python\n{code}\n```"
    if "." not in item.path:
        kind = "class" if isinstance(item.node, ast.ClassDef) else "function"
        question = _choose(_MODULE, full).format(item.path)
        yield question, f"`{item.path}` is a {kind} of the module `{module}`."


def _definitions(tree: ast.Module) -> Iterator[_Definition]:
    for node in tree.body:
        if not _is_public_definition(node):
            continue
        yield _Definition(node.name, node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if _is_public_definition(inner) and not isinstance(inner, ast.ClassDef):
                    yield _Definition(f"{node.name}.{inner.name}", inner)


def _is_public_definition(node: ast.stmt) -> TypeGuard[DefinitionNode]:
    return isinstance(node, DefinitionNode) and not node.name.startswith("_")


def _module_name(name: str) -> str:
    parts = PurePosixPath(name).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _purpose(node: ast.Module | DefinitionNode) -> str | None:
    """Return the first paragraph of the docstring on one line, or None where it says too little."""
    docstring = ast.get_docstring(node, clean=True)
    if not docstring:
        return None
    paragraph = _one_line(inspect.cleandoc(docstring).split("\n\n")[0])
    return _shortened(paragraph) if len(paragraph) >= 15 else None


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str) -> str:
    """Return at most MAX_ANSWER_CHARACTERS of `text`, ended at a sentence where there is one."""
    if len(text) <= MAX_ANSWER_CHARACTERS:
        return text
    cut = text[:MAX_ANSWER_CHARACTERS]
    end = cut.rfind(". ")
    return cut[: end + 1] if end > 0 else cut.rsplit(" ", 1)[0]


def _choose(templates: tuple[str, ...], salt: str) -> str:
    return templates[_hash(salt) % len(templates)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
