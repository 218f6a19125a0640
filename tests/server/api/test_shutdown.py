"""A server that stops lets its requests end, within a limit, and tells those that can't."""

import asyncio
import json

import httpx
import pytest
from bitwatt.api.server import new_server

from tests.fakes import FakeEngine, make_app, make_settings
from tests.server.api.test_disconnects import eventually
from tests.server.api.test_http_protocol import (
    BODY,
    CHUNKED,
    GET,
    LAST_GET,
    connect,
    post,
    refusal,
    statuses,
)

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


async def start(app, **settings):
    """Return the server, its task and its address."""
    server = new_server(app, make_settings(**settings))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    return server, task, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def connections(server):
    return list(server.server_state.connections)


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


async def test_a_second_ctrl_c_ends_a_stream_and_its_engine_without_a_traceback(caplog):
    """The engine was once left running, and the log ended in what waited for the end."""
    engine = FakeEngine(gate=asyncio.Event())
    server, task, url = await start(make_app(engine))
    async with httpx.AsyncClient(base_url=url) as client:
        answers = await open_requests(client, engine)
        server.should_exit = True  # as the first
        await asyncio.sleep(0.2)
        assert not task.done()
        server.force_exit = True  # as the second
        await task
        assert not engine.is_started
        await asyncio.gather(*answers, return_exceptions=True)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "part",
    [
        post()[:-3],
        post()[: -len(BODY)],
        post(b" " * 10**6)[:-3],
        post(BODY, b"Expect: 100-continue")[: -len(BODY)],
        CHUNKED[:-5],
    ],
    ids=["a part of the body", "a head", "most of a long body", "leave awaited", "a chunk"],
)
async def test_a_request_that_is_not_whole_is_told_at_once(part, caplog):
    """It once held the end back for as long as requests may drain, and left a traceback."""
    server, task, url = await start(make_app(), drain_timeout=3600)
    async with connect(url, part) as (reader, _):
        await eventually(lambda: server.server_state.tasks)
        server.should_exit = True
        received = await reader.read()
        received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert "the server is stopping" in refusal(received, 503)
        assert b"retry-after: " in received
    await task
    assert "Traceback" not in caplog.text


async def test_a_client_that_goes_on_sending_does_not_hold_the_end_back():
    server, task, url = await start(make_app(), drain_timeout=3600)
    async with connect(url, post()[:-3]):
        await eventually(lambda: server.server_state.tasks)
        server.should_exit = True
        await asyncio.wait_for(task, 30)


async def test_a_request_that_waits_before_its_model_is_told_without_a_traceback(caplog):
    app = make_app()
    waits, is_waiting = asyncio.Event(), asyncio.Event()

    async def take():
        is_waiting.set()
        await waits.wait()

    app.state.large_body_turns.take = take
    server, task, url = await start(app, drain_timeout=0.1)
    async with connect(url, post(BODY + b" " * 2**17)) as (reader, _):
        await is_waiting.wait()
        server.should_exit = True
        assert "the server is stopping" in refusal(await reader.read(), 503)
    await task
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("is_forced", [False, True], ids=["drained", "twice Ctrl-C"])
async def test_an_answer_that_nobody_reads_is_given_up_at_the_end(caplog, is_forced):
    engine = FakeEngine(chunk_size=50, reply="the quick brown fox " * 40)
    server, task, url = await start(make_app(engine), drain_timeout=3600 if is_forced else 0.1)
    many = {"n": 128, "ignore_eos": True, "max_tokens": 250, "logprobs": 20, "stream": True}
    body = json.dumps({"model": "tiny", "prompt": "a"} | many).encode()
    async with connect(url, *[post(body)] * 4):
        await eventually(lambda: not all(c.writable.is_set() for c in connections(server)))
        server.should_exit = True
        await eventually(lambda: not server.started or not server.servers[0].is_serving())
        server.force_exit = is_forced
        await task
        await eventually(lambda: not server.server_state.tasks)
    assert not engine.is_started
    assert "Traceback" not in caplog.text


class Panic(BaseException):
    """As Rust's panics come, and no Exception."""


@pytest.mark.parametrize("num_outputs", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_whatever_is_raised_ends_its_own_request_alone(
    caplog, monkeypatch, num_outputs, stream
):
    engine = FakeEngine()
    submit = engine.submit

    async def submit_and_panic(request):
        outputs = submit(request)
        for _ in range(num_outputs):
            yield await anext(outputs)
        raise Panic("at the disco")

    monkeypatch.setattr(engine, "submit", submit_and_panic)
    server, task, url = await start(make_app(engine))
    body = json.dumps({"model": "tiny", "prompt": "a", "stream": stream}).encode()
    async with connect(url, post(body) + LAST_GET) as (reader, _):
        received = await asyncio.wait_for(reader.read(), 20)
    assert statuses(received) == ([200] if stream and num_outputs else [500, 200])
    assert b"[DONE]" not in received
    assert "Panic: at the disco" in caplog.text
    async with connect(url, GET) as (reader, _):
        assert statuses(await reader.readuntil(b"}")) == [200]
    server.should_exit = True
    await task


async def test_whatever_is_raised_around_the_application_closes_the_connection(caplog):
    class Panics:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http":
                raise Panic("at the disco")
            await self.app(scope, receive, send)

    app = make_app()
    app.add_middleware(Panics)
    server, task, url = await start(app)
    async with connect(url, GET) as (reader, _):
        received = await asyncio.wait_for(reader.read(), 20)
    assert statuses(received) == [500]
    assert b"connection: close" in received
    assert "Panic: at the disco" in caplog.text
    server.should_exit = True
    await task
