"""What every test may use, and how tests run beside one another."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.extent import TEST_ALL

try:
    from hypothesis import settings
except ImportError:  # a GPU image has none, and the kernels' tests need none
    pass
else:
    # How long an example takes is the machine's affair.
    settings.register_profile("bitwatt", deadline=None)
    settings.load_profile("bitwatt")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return two workers a core: many a test waits for a restart, a time limit or a page.

    `-n logical` asks for it.
    """
    return 2 * (os.cpu_count() or 1)


def pytest_configure() -> None:
    """Give a worker its share of the cores, before torch is loaded and in its child processes.

    Two workers whose OpenMP regions both want two cores spin for each other. No test asks the real
    hub for a model.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None:
        share = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
    gc.disable()  # until all is collected


def pytest_collection_finish() -> None:
    """Have no collection of garbage look at the modules and tests: they stay until the end."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules of slow tests, so that at the end no worker waits for another's.

    slow(seconds) puts those first that take a worker for minutes.
    """
    slow: dict[Path, float] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds = mark.args[0] if mark.args else 10.0
            slow[item.path] = max(slow.get(item.path, 0.0), seconds)
    items.sort(key=lambda item: -slow.get(item.path, 0.0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_program"):
        name = mark.args[0]
        if shutil.which(name) is not None:
            continue
        if TEST_ALL:
            pytest.fail(f"{name} is not installed, and BITWATT_TEST_ALL=1 wants every test")
        pytest.skip(f"needs the program {name}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Take down the log that a `bitwatt serve` in the test's own process set up.

    The lines of the tests after it would go to standard error, between those of pytest.
    """
    logs = sys.modules.get("bitwatt.telemetry.logs")
    root = logging.getLogger()
    for handler in root.handlers[:] if logs else ():
        if isinstance(handler, logs.BackgroundHandler):
            handler.flush()
            root.removeHandler(handler)
            root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def one_browser(anyio_backend: str) -> AsyncIterator[None]:
    """One Chromium for a module's pages: a start takes longer than most tests of a page."""
    from tests.server.api.browser import kept_browser  # a GPU image has no playwright

    async with kept_browser():
        yield
