"""The best-known public names of the standard library, and what there is to ask about each.

A name is known by how many files of the library, its tests included, use it. The list is made once
and committed, so that every version of Python trains on the same questions and is asked the same:

    python -m bitwatt.training names
"""

import ast
import builtins
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bitwatt.evaluation.names import Kind, Name

NUM_NAMES = 1000
MAX_SENTENCE = 130
MAX_SIGNATURE = 72
MAX_MEMBERS = 6

_TYPES = (str, list, dict, set, tuple, int, float)  # whose methods are taken as well
_SUBMODULES = (
    "asyncio.subprocess",
    "collections.abc",
    "concurrent.futures",
    "email.message",
    "html.parser",
    "http.client",
    "http.cookies",
    "http.server",
    "importlib.metadata",
    "importlib.resources",
    "importlib.util",
    "json.decoder",
    "logging.config",
    "logging.handlers",
    "multiprocessing.pool",
    "multiprocessing.shared_memory",
    "os.path",
    "unittest.mock",
    "urllib.error",
    "urllib.parse",
    "urllib.request",
    "wsgiref.simple_server",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax.saxutils",
)
# Out of the language's way, on their way out of the library, or with a side effect at import.
_EXCLUDED = {
    "__future__",
    "antigravity",
    "asynchat",
    "asyncore",
    "distutils",
    "ensurepip",
    "idlelib",
    "imp",
    "lib2to3",
    "msilib",
    "nis",
    "nt",
    "posix",
    "posixpath",
    "ntpath",
    "pydoc_data",
    "smtpd",
    "sre_compile",
    "sre_constants",
    "sre_parse",
    "this",
    "turtledemo",
}
# What the docstring leaves to its signatures, or says in more than a sentence.
_PURPOSES = {
    "bytes": "An immutable sequence of integers from 0 to 255.",
    "bytearray": "A mutable sequence of integers from 0 to 255.",
    "dict": "A mapping of keys to values that keeps the order of insertion.",
    "dir": "Return the names of an object's attributes, or those in the current scope.",
    "frozenset": "An immutable set of hashable elements.",
    "getattr": "Get a named attribute of an object, or a default where it has none.",
    "int": "An integer of any size, made from a number or a string.",
    "iter": "Return an iterator over an object.",
    "map": "Make an iterator that computes a function of every item of an iterable.",
    "max": "Return the largest item of an iterable, or of two or more arguments.",
    "min": "Return the smallest item of an iterable, or of two or more arguments.",
    "next": "Return the next item of an iterator, or a default where it is exhausted.",
    "range": "A sequence of integers from a start to a stop by a step.",
    "set": "An unordered collection of unique hashable elements.",
    "slice": "A range of indices, as used in extended slicing.",
    "str": "An immutable sequence of Unicode characters.",
    "super": "Give access to the methods of a parent class.",
    "type": "Return the type of an object, or make a new class.",
    "vars": "Return the __dict__ of an object, or the local variables.",
    "zip": "Iterate over several iterables in parallel, as tuples of their items.",
    "dict.get": "Return the value of a key if it is in the dictionary, else a default.",
    "dict.items": "Return a view of the dictionary's pairs of key and value.",
    "dict.keys": "Return a view of the dictionary's keys.",
    "dict.pop": "Remove a key and return its value, or a default where it is missing.",
    "dict.update": "Add the items of a mapping or an iterable of pairs to the dictionary.",
    "dict.values": "Return a view of the dictionary's values.",
    "dict.copy": "Return a shallow copy of the dictionary.",
    "dict.clear": "Remove all items from the dictionary.",
    "str.count": "Return how often a substring occurs in the string without overlap.",
    "str.endswith": "Return whether the string ends with a suffix.",
    "str.find": "Return the lowest index at which a substring is found, or -1.",
    "str.format": "Return the string with its replacement fields filled in.",
    "str.format_map": "Return the string with its replacement fields filled in from a mapping.",
    "str.index": "Return the lowest index at which a substring is found, or raise ValueError.",
    "str.rfind": "Return the highest index at which a substring is found, or -1.",
    "str.rindex": "Return the highest index at which a substring is found, or raise ValueError.",
    "str.startswith": "Return whether the string starts with a prefix.",
    "set.update": "Add the elements of other iterables to the set.",
    "code": "Emulate Python's interactive interpreter.",
    "codecs": "Registry and base classes of text encodings.",
    "contextlib.contextmanager": "Make a context manager of a generator function.",
    "ctypes.Array": "Base class of arrays of C values.",
    "functools": "Tools for working with functions and callable objects.",
    "http.cookies": "Read and write HTTP cookies.",
    "itertools.repeat": "Yield an object without end, or a given number of times.",
    "list.reverse": "Reverse the list in place.",
    "numbers.Rational": "Abstract base class of rational numbers.",
    "operator": "The operators of the language as functions.",
    "runpy": "Locate and run Python code by the name of its module.",
    "sys.intern": "Enter a string in the table of interned strings.",
    "threading": "Run several threads of control in one process.",
    "threading.Lock": "Make a lock that one thread at a time can hold.",
    "unittest.addModuleCleanup": "Add a function to be called after the tests of a module.",
    "unittest.mock.patch": "Replace an attribute by a mock, as a decorator or a context manager.",
    "urllib.parse.quote": "Escape the characters of a string that a URL reserves.",
    "os": "Give portable access to the operating system.",
    "math": "Compute the mathematical functions of the C standard.",
}
_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)?(\s*->.*)?$|^[\w.]+\s*\(.*\)\s*[-=]+>?.*$")
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<=[.!?])\s+(?=[A-Z`'\"(*])")


def choose_names(limit: int = NUM_NAMES) -> list[Name]:
    """Return the `limit` best-known names, the best-known first, as this Python documents them."""
    uses = _count_uses(Path(sysconfig.get_paths()["stdlib"]))
    scores: dict[str, tuple[int, object]] = {}
    for path, value in _candidates(uses):
        scores[path] = (uses[path], value)
    ranked = sorted(scores, key=lambda path: (-scores[path][0], path))
    chosen = [path for path in ranked if _purpose(path, scores[path][1])][:limit]
    last = Counter(path.rpartition(".")[2] for path in ranked)
    return [
        _describe(path, scores[path][1], uses, is_unique=last[path.rpartition(".")[2]] == 1)
        for path in chosen
    ]


def _candidates(uses: Counter[str]) -> Iterator[tuple[str, object]]:
    for name, value in vars(builtins).items():
        if not name.startswith("_") and callable(value):
            yield name, value
    for kind in _TYPES:
        for name, value in vars(kind).items():
            if not name.startswith("_") and callable(value):
                uses[f"{kind.__name__}.{name}"] = uses[f".{name}"]
                yield f"{kind.__name__}.{name}", value
    for name in (*sorted(sys.stdlib_module_names - _EXCLUDED), *_SUBMODULES):
        module = None if name.startswith("_") else _imported(name)
        if module is None:
            continue
        yield name, module
        for member, value in vars(module).items():
            is_one = inspect.isclass(value) or inspect.isroutine(value)
            if is_one and not member.startswith("_") and _belongs(name, member, value, uses):
                yield f"{name}.{member}", value


def _belongs(module: str, member: str, value: object, uses: Counter[str]) -> bool:
    """Say whether `member` is the module's own, and no other module's that it imported."""
    if getattr(builtins, member, None) is value or uses[f"{module}.{member}"] == 0:
        return False
    home = str(getattr(value, "__module__", None) or module)
    own = {module, f"_{module}", *(getattr(sys.modules[module], "__all__", ()) and (home,))}
    exported = member in getattr(sys.modules[module], "__all__", (member,))
    return exported and (home in own or home.startswith((f"{module}.", "_", "posix", "generic")))


def _imported(name: str) -> ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _describe(path: str, value: object, uses: Counter[str], is_unique: bool) -> Name:
    parent = path.rpartition(".")[0]
    kind: Kind
    if inspect.ismodule(value):
        kind = "module"
    elif inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
    else:
        kind = "method" if parent in {one.__name__ for one in _TYPES} else "function"
    return Name(
        path=path,
        kind=kind,
        purpose=_purpose(path, value) or "",
        signature=_signature(path, value) if kind in ("function", "class", "method") else None,
        module=None if kind in ("module", "method") or not is_unique else parent or "builtins",
        members=_members(path, value, uses) if kind in ("module", "class") else (),
    )


def _purpose(path: str, value: object) -> str | None:
    """Return the first sentence of the documentation, or None where there is no fit one."""
    if path in _PURPOSES:
        return _PURPOSES[path]
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    if not isinstance(own, str):
        return None
    lines = inspect.cleandoc(own).splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE_LINE.match(lines[0].strip())):
        lines.pop(0)
    sentence = _SENTENCE_END.split(_paragraph(lines))[0].strip()
    sentence = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", sentence.replace("``", "`"))
    sentence = re.sub(r"^(Module )?[\w.]+ +--? +", "", sentence).rstrip(".:; ")
    is_fit = 12 <= len(sentence) <= MAX_SENTENCE and " " in sentence and sentence.isascii()
    if not is_fit or "->" in sentence or sentence.count("(") != sentence.count(")"):
        return None
    return sentence[0].upper() + sentence[1:] + ("" if sentence[-1] in "!?" else ".")


def _paragraph(lines: list[str]) -> str:
    paragraph: list[str] = []
    for line in lines:
        if not line.strip() or set(line.strip()) <= set("-=*"):
            break
        paragraph.append(line)
    return " ".join(" ".join(paragraph).split())


def _signature(path: str, value: object) -> str | None:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    try:
        bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    except ValueError:
        return None
    text = f"{path}{bare}".replace(", /", "").replace("(/)", "()")
    is_fit = len(text) <= MAX_SIGNATURE and "<" not in text and text != f"{path}(*args, **kwargs)"
    return text if is_fit else None


def _members(path: str, value: object, uses: Counter[str]) -> tuple[str, ...]:
    prefix = "" if inspect.isclass(value) else path
    known = [
        (uses[f"{prefix}.{name}"], name)
        for name, member in vars(value).items()
        if not name.startswith("_") and not inspect.ismodule(member)
    ]
    best = sorted((count, name) for count, name in known if count > 1)
    best.sort(key=lambda pair: (-pair[0], pair[1]))
    chosen = tuple(name for _, name in best[:MAX_MEMBERS])
    return chosen if len(chosen) >= 3 else ()


def _count_uses(root: Path) -> Counter[str]:
    """Return in how many files each dotted name is used; `.name` counts attributes of objects."""
    uses: Counter[str] = Counter()
    for path in root.rglob("*.py"):
        if "site-packages" in path.parts or "lib2to3" in path.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        uses.update(_names_in(tree))
    return uses


def _names_in(tree: ast.Module) -> set[str]:
    aliases: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                aliases[item.asname or item.name.partition(".")[0]] = (
                    item.name if item.asname else item.name.partition(".")[0]
                )
                found.add(item.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
                found.add(f"{node.module}.{item.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(aliases.get(node.id, node.id))
        elif isinstance(node, ast.Attribute):
            found.add(f".{node.attr}")
            dotted = _dotted(node)
            if dotted:
                first, _, rest = dotted.partition(".")
                if first in aliases:
                    found.add(f"{aliases[first]}.{rest}")
    return found


def _dotted(node: ast.expr) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None
