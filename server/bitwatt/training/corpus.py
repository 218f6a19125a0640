"""The training text: Python's standard library, and conversations made from its docstrings.

Every machine that runs bitwatt has it, so the embedded pair can be trained anywhere. The order is
fixed, and a file is held out for validation by a hash of its name, with all that is made from it.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitwatt.training.conversations import Conversation, conversations_from, small_talk

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


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus. `name` is its path in the library, with `#topic` for a part of it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """Plain texts and conversations of one side of the corpus, in a fixed order."""

    documents: tuple[Document, ...]
    conversations: tuple[Conversation, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training side and the held-out side; no document is on both."""

    train: Split
    held_out: Split


def load_corpus(root: Path | None = None) -> Corpus:
    """Return the corpus read from `root`, the running Python's standard library by default."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sides: dict[bool, tuple[list[Document], list[Conversation]]] = {
        False: ([], []),
        True: ([], []),
    }
    for document in _documents(root):
        documents, conversations = sides[is_held_out(document.name)]
        documents.append(document)
        conversations.extend(conversations_from(document.name, document.text))
    sides[False][1].extend(small_talk())
    train, held_out = (Split(tuple(texts), tuple(talks)) for texts, talks in sides.values())
    return Corpus(train=train, held_out=held_out)


def is_held_out(name: str) -> bool:
    """Say whether the document of that name belongs to validation."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def in_fixed_shuffle(names: Iterable[str]) -> list[int]:
    """Return the indices of `names` in an order that depends on the names alone."""
    keys = [hashlib.sha256(b"order" + name.encode()).digest() for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)


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
