"""Schemathesis on /openapi.json, all its checks, against a server that listens."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import start_server, stop_server
from tests.extent import TEST_ALL
from tests.fakes import FakeEngine, make_app, make_info, run_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow(400)]

# Of an operation and phase. The embedded model answers what the fake one does by the same routes.
NUM_EXAMPLES = int(os.environ.get("BITWATT_NUM_EXAMPLES", 100 if TEST_ALL else 5))
PHASES = "examples,fuzzing,stateful"
# Coverage tries every value at a bound, and every kind of wrong one, of every field: the same each
# time, so that the model alone is asked.
PHASES_OF_MODEL = f"coverage,{PHASES}"
NUM_EXAMPLES_OF_MODEL = int(os.environ.get("BITWATT_NUM_EXAMPLES", 30))


async def run_schemathesis(
    url: str, folder: Path, *flags: str, phases: str, num_examples: int
) -> str:
    """Return what it says if it finds something, else nothing."""
    command = (sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json")
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--checks", "all", "--phases", phases),
        *("--max-examples", str(num_examples), "--seed", "1"),
        # With one it keeps and shrinks what is best at being accepted, for half of all time.
        *("--generation-database", "none"),
        *("--no-color", "--continue-on-failure", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "SCHEMATHESIS_HOOKS": "tests.server.api.schemathesis_hooks",
        },
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return "" if process.returncode == 0 else output.decode()


@pytest.mark.timeout(7200 if TEST_ALL else 300)
async def test_the_document_is_true(tmp_path):
    """A short context bounds what a body can ask for, and so the time that it takes."""
    engine = FakeEngine(info=make_info(max_model_len=64))
    async with run_server(make_app(engine, api_key="k")) as url:
        key = ("--header", "Authorization: Bearer k")
        found = await run_schemathesis(
            url, tmp_path, *key, phases=PHASES, num_examples=NUM_EXAMPLES
        )
    assert not found, found
    assert engine.submitted
    assert not engine.running


@pytest.mark.skipif(not TEST_ALL, reason="BITWATT_TEST_ALL=1 runs it")
@pytest.mark.timeout(7200)
async def test_the_document_is_true_of_the_embedded_model(tmp_path):
    server = start_server("--max-model-len", "64")
    try:
        found = await run_schemathesis(
            server.url, tmp_path, phases=PHASES_OF_MODEL, num_examples=NUM_EXAMPLES_OF_MODEL
        )
    finally:
        stop_server(server)
    assert not found, found
