"""The text phase: the standard library's sources and documentation, without what repeats.

Every machine that runs bitwatt has it, so the embedded pair can be trained anywhere. A file is
held out for validation by a hash of its name.
"""

import ast
import builtins
import hashlib
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 5

# Tests, bundled copies of other projects, tables without language in them, and files that name
# the machine they were built on.
_EXCLUDED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_EXCLUDED_PREFIXES = ("config-", "encodings/cp", "encodings/iso", "encodings/mac", "_sysconfigdata")
_TOPICS = "pydoc_data/topics.py"
_MIN_BLOCK = 3


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus. `name` is its path in the library, with `#topic` for a part of it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training side and the held-out side, each in a fixed order; no file is on both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def load_corpus(root: Path | None = None) -> Corpus:
    """Return the corpus read from `root`, the running Python's standard library by default.

    A block of lines that an earlier document has is left out, so that nothing held out is trained
    on: the held-out documents count as the later ones.
    """
    is_default = root is None
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = [*_documents(root), *(_compiled_modules() if is_default else ())]
    train = [document for document in documents if not is_held_out(document.name)]
    held_out = [document for document in documents if is_held_out(document.name)]
    unique = list(_without_repeats([*train, *held_out]))
    return Corpus(
        train=tuple(document for document in unique if not is_held_out(document.name)),
        held_out=tuple(document for document in unique if is_held_out(document.name)),
    )


def is_held_out(name: str) -> bool:
    """Say whether the document of that name belongs to validation."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def _documents(root: Path) -> Iterator[Document]:
    for path in sorted(_python_files(root)):
        name = path.relative_to(root).as_posix()
        if name.startswith(_EXCLUDED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name == _TOPICS:
            yield from _topics(text)
        elif text.strip():
            yield Document(name, text)


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in _EXCLUDED_DIRECTORIES:
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _topics(source: str) -> Iterator[Document]:
    """Yield the language reference that `help()` shows, a document a topic, as plain text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for topic in sorted(topics):
                yield Document(f"{_TOPICS}#{topic}", topics[topic])


def _compiled_modules() -> Iterator[Document]:
    """Yield what `help()` tells of the built-in types and of the modules written in C."""
    for name in ("builtins", *sorted(sys.stdlib_module_names - {"antigravity", "this"})):
        if name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = builtins if name == "builtins" else importlib.import_module(name)
        except ImportError:
            continue
        if not str(getattr(module, "__file__", None) or "").endswith(".py"):
            yield Document(f"help/{name}", "\n\n".join(_help(name, module)) + "\n")


def _help(name: str, module: object) -> Iterator[str]:
    yield f"{name}\n{inspect.getdoc(module) or ''}".rstrip()
    for member, value in sorted(vars(module).items()):
        if member.startswith("_") or not callable(value):
            continue
        yield _entry(f"{name}.{member}", value)
        if inspect.isclass(value):
            for inner, method in sorted(vars(value).items()):
                if not inner.startswith("_") and callable(method):
                    yield _entry(f"{name}.{member}.{inner}", method)


def _entry(path: str, value: object) -> str:
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        signature = ""
    return f"{path}{signature}\n{inspect.getdoc(value) or ''}".rstrip()


def _without_repeats(documents: list[Document]) -> Iterator[Document]:
    """Yield the documents without the blocks of lines, of _MIN_BLOCK or more, already seen."""
    seen: set[bytes] = set()
    for document in documents:
        kept: list[str] = []
        for block in document.text.split("\n\n"):
            digest = hashlib.sha256(" ".join(block.split()).encode()).digest()
            if block.count("\n") + 1 >= _MIN_BLOCK and digest in seen:
                continue
            seen.add(digest)
            kept.append(block)
        text = "\n\n".join(kept)
        if text.strip():
            yield Document(document.name, text)
