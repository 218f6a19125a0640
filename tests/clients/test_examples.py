"""The examples under clients/ run as they are."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.test_compare import make_pair_app
from tests.extent import TEST_ALL
from tests.fakes import run_server

pytestmark = pytest.mark.anyio

CLIENTS = Path(__file__).parents[2] / "clients"
CURL = sorted((CLIENTS / "curl").glob("*.sh"))
PYTHON = sorted([*(CLIENTS / "openai").glob("*.py"), *(CLIENTS / "anthropic").glob("*.py")])
NODE = sorted((CLIENTS / "node").glob("*.js"))
ANSWERED = ["the quick brown fox", "tokens]"]
SAID = {
    "chat.sh": ["data: [DONE]", '"completion_tokens"'],
    "models.sh": ['"id":"tiny-fp16"', '"packed_weights_bytes":100'],
    "shadow.sh": ['"text_completion"', "bitwatt_shadow_requests_total{"],
    "messages.sh": ["the quick brown fox", '"end_turn"'],
    "chat.py": ANSWERED,
    "responses.py": ANSWERED,
    "messages.py": ANSWERED,
    "chat.js": ANSWERED,
    "messages.js": ANSWERED,
    "both_models.py": ["tiny: ", "tiny-fp16: "],
}


async def run_example(*command):
    """Return what the example prints, run against a server of two models that wants a key."""
    app, _ = make_pair_app(api_key="k")
    async with run_server(app, api_key="k") as url:
        given = {"BITWATT_URL": url, "BITWATT_KEY": "k", "BITWATT_MODEL": "tiny"}
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | given, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


@pytest.mark.needs_program("curl")
@pytest.mark.parametrize("path", CURL, ids=lambda path: path.name)
async def test_a_curl_example_runs(path):
    output = await run_example("sh", str(path))
    for said in SAID[path.name]:
        assert said in output


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
async def test_an_example_in_python_runs(path):
    output = await run_example(sys.executable, str(path))
    for said in SAID[path.name]:
        assert said in output


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory):
    """The examples with their packages beside them, as `npm install` leaves them."""
    folder = shutil.copytree(CLIENTS / "node", tmp_path_factory.mktemp("examples") / "node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=200)
    return folder


@pytest.mark.skipif(not TEST_ALL, reason="asks npm's registry: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.needs_program("node")
@pytest.mark.needs_program("npm")
@pytest.mark.parametrize("path", NODE, ids=lambda path: path.name)
async def test_an_example_in_node_runs(path, node_folder):
    output = await run_example("node", str(node_folder / path.name))
    for said in SAID[path.name]:
        assert said in output
