"""The kernels, and their benchmarks, know nothing of the server."""

import ast
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def test_nothing_in_kernels_imports_the_server() -> None:
    paths = list(KERNELS.rglob("*.py"))
    assert any(path.parent.name == "bench" for path in paths)
    found = [
        (path.relative_to(KERNELS), name)
        for path in paths
        for name in imported(path)
        if name.partition(".")[0] == "bitwatt"
    ]
    assert found == []
