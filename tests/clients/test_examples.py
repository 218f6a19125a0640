"""The examples under clients/ run as they are."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.clients.test_compare import make_pair_app
from tests.fakes import run_server

pytestmark = pytest.mark.anyio

CLIENTS = Path(__file__).parents[2] / "clients"
CURL = sorted((CLIENTS / "curl").glob("*.sh"))
OPENAI = sorted((CLIENTS / "openai").glob("*.py"))
SAID = {
    "chat.sh": ["data: [DONE]", '"completion_tokens"'],
    "models.sh": ['"id":"tiny-fp16"', '"packed_weights_bytes":100'],
    "shadow.sh": ['"text_completion"', "bitwatt_shadow_requests_total{"],
    "chat.py": ["the quick brown fox", "tokens]"],
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


@pytest.mark.parametrize("path", OPENAI, ids=lambda path: path.name)
async def test_an_example_of_openais_client_runs(path):
    output = await run_example(sys.executable, str(path))
    for said in SAID[path.name]:
        assert said in output
