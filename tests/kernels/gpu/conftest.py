"""Triton is on Linux and x86-64 only; elsewhere there is nothing to test here."""

from contextlib import suppress
from importlib.util import find_spec

import pytest

collect_ignore_glob = ["*"] if find_spec("triton") is None else []
AT_ONCE = 16


@pytest.fixture(scope="module")
def compilations(request: pytest.FixtureRequest) -> list[pytest.Function]:
    """The module's tests marked `compiles` for which nothing is compiled yet, in their order."""
    return [
        item
        for item in request.session.items
        if item.path == request.path and item.get_closest_marker("compiles")
        if isinstance(item, pytest.Function)
    ]


@pytest.fixture(autouse=True)
def compiled_ahead(request: pytest.FixtureRequest, compilations: list[pytest.Function]) -> None:
    """Compile for others of its cards' generation too: machine_code.py disassembles all at once.

    What fails, fails again in its own test.
    """
    if request.node not in compilations:
        return
    generation = generation_of(request.node)
    compilations.sort(
        key=lambda item: (item is not request.node, generation_of(item) != generation)
    )
    for item in compilations[:AT_ONCE]:
        for mark in item.iter_markers("compiles"):
            with suppress(Exception):
                mark.kwargs["by"](**item.callspec.params)
    del compilations[:AT_ONCE]


def generation_of(item: pytest.Function) -> int:
    """Return the digits of its card before the last; 9 where it is no parameter."""
    return int(item.callspec.params.get("capability", 90)) // 10
