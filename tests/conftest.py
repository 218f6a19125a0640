"""What every test may use, and how tests run beside one another."""

import gc
import logging
import os
import shutil
import ssl
import sys
from collections.abc import AsyncIterator, Generator
from functools import cache
from typing import Any

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

# Modules that share what a worker makes once, and so are run by one.
TOGETHER = {
    "the embedded pair as it is served, of 6 s to start": [
        "end_to_end/test_answers.py",
        "end_to_end/test_likelihoods.py",
        "end_to_end/test_page.py",
        *([] if TEST_ALL else ["end_to_end/test_random_requests.py"]),
        "end_to_end/test_readme.py",
        "end_to_end/test_serve.py",
        "end_to_end/test_serve_gguf.py",
        "end_to_end/test_structured_output.py",
        "end_to_end/test_termination.py",
        "end_to_end/test_tools.py",
    ],
    "transformers' models, of 4 s to import": [
        "server/checkpoints/test_conversion.py",
        "server/checkpoints/test_corrupt_folders.py",
        "server/checkpoints/test_corrupt_gguf.py",
        "server/checkpoints/test_exact.py",
        "server/checkpoints/test_gguf.py",
        "server/checkpoints/test_gguf_export.py",
        "server/checkpoints/test_huggingface.py",
        "server/checkpoints/test_mlx.py",
        "server/engine/test_embedding.py",
        "server/model/test_families.py",
        "server/test_inspection.py",
        "server/test_quantizing.py",
        "server/training/test_builtin.py",
        "server/training/test_export.py",
    ],
}
# Programs that do as well for the tests.
STAND_INS = {"chromium": ["chromium-headless-shell"]}
UNITS = {f"tests/{path}": unit for unit, paths in TOGETHER.items() for path in paths}


def share_cores() -> None:
    """Give a worker its share of the cores, before torch is loaded and in its child processes.

    Two workers whose OpenMP regions both want two cores spin for each other; where a test asks for
    two threads, they sleep.
    """
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None:
        share = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# In no hook: where a test is named by its path, conftest.py beside it loads torch before the first.
share_cores()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return two workers a core: many a test waits for a restart or a page.

    Each takes 8 s to begin. `-n logical` asks for it.
    """
    return 2 * (os.cpu_count() or 1)


def pytest_configure() -> None:
    """No test asks the real hub for a model."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Every HTTP client, of thousands, would read all of the authorities again, for 25 ms. None of
    # the tests' uses one.
    ssl.create_default_context = cache(ssl.create_default_context)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among the modules and tests as they come, nor later: they all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def unit_of(nodeid: str) -> str:
    """Return what a worker runs as a whole: the test's module, or its modules of TOGETHER."""
    path = nodeid.partition("::")[0]
    return UNITS.get(path, path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands out units, in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class UnitScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return UnitScheduling(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the units of slow tests, so that at the end no worker waits for another's.

    slow(seconds) puts those first that take a worker for minutes.
    """
    slow: dict[str, dict[str, float]] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds = mark.args[0] if mark.args else 10.0
            modules = slow.setdefault(unit_of(item.nodeid), {})
            path = item.nodeid.partition("::")[0]
            modules[path] = max(modules.get(path, 0.0), seconds)
    items.sort(key=lambda item: -sum(slow.get(unit_of(item.nodeid), {}).values()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Give torch back the threads it had: choose_backend sets them for the whole process.

    After a test of two threads all that came later on its worker had two, and the trainer's tests
    took 57 s of CPU time instead of 7.
    """
    torch = sys.modules.get("torch")
    num_threads = torch.get_num_threads() if torch else None
    try:
        return (yield)
    finally:
        if torch and torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_program"):
        name = mark.args[0]
        if any(map(shutil.which, (name, *STAND_INS.get(name, ())))):
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
