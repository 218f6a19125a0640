"""How a server ends, by a signal, while streams run."""

import asyncio
import json
import signal
import time

import httpx
import pytest

from tests.end_to_end.conftest import Server

pytestmark = pytest.mark.slow


def test_two_interrupts_end_a_server_with_an_open_stream_and_without_a_traceback(
    own_server: Server,
) -> None:
    body = {"model": "builtin", "prompt": "a", "max_tokens": 900, "stream": True}
    asked = body | {"ignore_eos": True}
    url = f"{own_server.url}/v1/completions"
    with httpx.stream("POST", url, json=asked, timeout=60) as answer:
        next(answer.iter_lines())
        own_server.process.send_signal(signal.SIGINT)
        while not own_server.logged("Shutting down"):  # of two signals at once one is told
            time.sleep(0.01)
        own_server.process.send_signal(signal.SIGINT)
        assert own_server.process.wait(timeout=20) == 130
    own_server.reader.join(timeout=10)
    assert "Traceback" not in "".join(own_server.log)


@pytest.mark.anyio
async def test_a_server_that_is_told_to_end_lets_32_streams_finish(own_server: Server) -> None:
    """Each has begun when SIGTERM comes, and each gets all its tokens, its usage and its end."""
    num_streams, num_tokens = 32, 160
    begun = asyncio.Semaphore(0)

    async def read(client: httpx.AsyncClient, seed: int) -> list[str]:
        body = {"model": "builtin", "prompt": "def ", "max_tokens": num_tokens, "seed": seed}
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        lines = []
        async with client.stream("POST", "/v1/completions", json=body | options) as answer:
            async for line in answer.aiter_lines():
                if not lines:
                    begun.release()
                lines.append(line)
        return [line for line in lines if line]

    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=own_server.url, timeout=60, limits=limits) as client:
        streams = [asyncio.create_task(read(client, seed)) for seed in range(num_streams)]
        for _ in streams:
            await begun.acquire()
        assert not all(stream.done() for stream in streams)
        own_server.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*streams)
    for lines in answers:
        *_, usage, done = lines
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == num_tokens
        last = json.loads(lines[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
    assert own_server.process.wait(timeout=40) == 0
    own_server.reader.join(timeout=10)
    assert "Traceback" not in "".join(own_server.log)
