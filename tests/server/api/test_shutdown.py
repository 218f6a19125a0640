"""A server that stops lets its requests end, within a limit, and tells those that can't."""

import asyncio

import httpx
import pytest
from bitwatt.api.server import new_server

from tests.fakes import FakeEngine, make_app, make_settings

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


async def start(app, **settings):
    """Return the server, its task and its address."""
    server = new_server(app, make_settings(**settings))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    return server, task, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


async def open_requests(client, engine):
    """Return the answers to come of one request streamed and one not."""
    answers = [
        asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        for stream in (True, False)
    ]
    while len(engine.running) < 2:  # noqa: ASYNC110 - the fake has no events to wait for
        await asyncio.sleep(0.005)
    return answers


async def test_open_requests_end_before_the_server_does():
    engine = FakeEngine(gate=asyncio.Event())
    server, task, url = await start(make_app(engine))
    async with httpx.AsyncClient(base_url=url) as client:
        answers = await open_requests(client, engine)
        server.should_exit = True
        await asyncio.sleep(0.2)
        assert not task.done()
        engine.gate.set()
        streamed, plain = await asyncio.gather(*answers)
    await task
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert plain.json()["choices"][0]["message"]["content"] == "the quick brown fox"
    assert not engine.is_started


async def test_requests_beyond_the_limit_are_told_and_aborted():
    engine = FakeEngine(gate=asyncio.Event())
    app = make_app(engine, keep_alive=0.01)  # the stream has begun
    server, task, url = await start(app, drain_timeout=0.1)
    async with httpx.AsyncClient(base_url=url) as client:
        answers = await open_requests(client, engine)
        server.should_exit = True
        streamed, plain = await asyncio.gather(*answers)
    await task
    assert plain.status_code == 503
    assert plain.headers["retry-after"]
    for response in (streamed, plain):
        assert "the server is stopping" in response.text
    assert not engine.running
