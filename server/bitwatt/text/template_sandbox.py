"""The environment that chat templates are rendered in: as transformers has it, and bounded.

A template comes with a model and runs in the API's process. It reaches no attribute of Python's
own and changes nothing, as in Jinja's sandbox. Beyond that:

- every pass of a loop and every call looks at the processor time that the rendering has taken;
- whatever can make much of little (operators, methods and filters of strings and lists) is
  refused before it works, by the size its result would have.

So a template ends by itself: no thread is left behind, and no memory beyond the limits is taken.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from math import inf
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bitwatt.text.template_limits import (
    SIZES_OF_FILTERS,
    SIZES_OF_METHODS,
    Work,
    check_number,
    size_of,
    size_of_format,
    size_of_result,
)

__all__ = ["TemplateSandbox"]

_JINJAS_OWN = frozenset({"_loop_vars", "_block_vars"})


class _Generation(Extension):
    """Takes `{% generation %}` blocks, which only mark what a model is trained on."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body, in a scope of its own as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Bounding(NodeTransformer):
    """Puts calls where Jinja has none: into loops, and around what makes values."""

    def __init__(self, environment: "TemplateSandbox") -> None:
        self._environment = environment

    def _call(self, name: str, at: nodes.Node, *args: nodes.Node) -> nodes.Call:
        method = nodes.EnvironmentAttribute(name)
        call = nodes.Call(method, list(args), [], None, None)
        call.set_lineno(at.lineno).set_environment(self._environment)
        return call

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        # Jinja asks the test of each element, the body of those that pass.
        counted = self._call("pass_of_loop", node)
        node.test = counted if node.test is None else nodes.And(counted, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("concatenate", node, *node.nodes)

    def _visit_literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # what is assigned to
            return node
        try:
            node.as_const()
        except nodes.Impossible:
            return self._call("collect", node, node)
        return node

    visit_List = visit_Tuple = visit_Dict = _visit_literal  # noqa: N815


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja with transformers' filters and functions, and limits. Safe in any thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._rendering = threading.local()
        self._compiling = Work(inf)
        self.finalize = self._finalize
        self.concat = self._concat  # type: ignore[method-assign]
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now
        self.filters["tojson"] = self._to_json
        for name, size in SIZES_OF_FILTERS.items():
            self.filters[name] = self._bounded(FILTERS[name], size)

    @contextmanager
    def rendering(self, time_limit_s: float, now: datetime) -> Iterator[None]:
        """Bound what this thread renders within the block, at this time."""
        self._rendering.work, self._rendering.now = Work(time_limit_s), now
        try:
            yield
        finally:
            del self._rendering.work, self._rendering.now

    @property
    def _work(self) -> Work:
        # Constants are folded, so filters called, while a template is compiled.
        return getattr(self._rendering, "work", self._compiling)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounding(self).visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._work.count_call()
        text = getattr(obj, "__self__", None)
        if isinstance(text, str) and (size := SIZES_OF_METHODS.get(obj.__name__)) is not None:
            given = {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN}
            self._work.charge(size(text, *args, **given))
        result = super().call(context, obj, *args, **kwargs)
        if obj is dict:
            self._work.charge(size_of(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._work.charge(size_of_result(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        return formatted and self._bounded(
            formatted, lambda *args, **kwargs: size_of_format(value.__self__, "{", args, kwargs)
        )

    def pass_of_loop(self) -> bool:
        """Return True, in every pass of a loop: it is called so that call counts it."""
        return True

    def collect(self, value: Any) -> Any:
        """Return the list, tuple or mapping that a template writes."""
        self._work.charge(size_of(value))
        return value

    def concatenate(self, *values: Any) -> str:
        """Return what `~` makes of the values."""
        self._work.charge(sum(map(size_of, values)))
        return "".join(map(str, values))

    def _finalize(self, value: Any) -> Any:
        self._work.charge(size_of(value))
        return value

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self._work.charge(sum(map(len, pieces)))
        return "".join(pieces)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        check_number(len(indent) if isinstance(indent, str) else indent or 0)
        self._work.charge(size_of(value) * (1 + size_of(indent) + size_of(separators)))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _strftime_now(self, pattern: str) -> str:
        self._work.charge(len(pattern))
        now: datetime = self._rendering.now
        return now.strftime(pattern)

    def _bounded(self, function: Callable[..., Any], size: Callable[..., int]) -> Any:
        is_context_passed = hasattr(function, "jinja_pass_arg")

        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._work.charge(size(*args[is_context_passed:], **kwargs))
            return function(*args, **kwargs)

        for name in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, name):
                setattr(bounded, name, getattr(function, name))
        return bounded


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
