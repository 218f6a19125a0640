"""What every test may use."""

import os
import shutil

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_program"):
        name = mark.args[0]
        if shutil.which(name) is not None:
            continue
        if os.environ.get("BITWATT_TEST_ALL") == "1":
            pytest.fail(f"{name} is not installed, and BITWATT_TEST_ALL=1 wants every test")
        pytest.skip(f"needs the program {name}")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
