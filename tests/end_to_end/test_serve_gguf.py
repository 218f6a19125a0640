"""A GGUF file, served for real."""

from pathlib import Path

import httpx
import pytest

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.server.checkpoints.embedded_gguf import write_embedded

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What does textwrap.dedent do?"}]


def test_a_gguf_file_is_served_as_the_folder_is(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_embedded(path)
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}

    def answer(url: str, model: str) -> object:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body | {"model": model}, timeout=60)
        return reply.raise_for_status().json()["choices"]

    started = start_server(str(path))
    try:
        started.wait_ready()
        assert answer(started.url, "tiny") == answer(server.url, "builtin")
    finally:
        stop_server(started)
