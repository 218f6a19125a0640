"""A client that goes away takes its requests with it, at once."""

import asyncio
import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngine, make_app, run_server

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


async def eventually(condition):
    """Wait until it holds; the test's own time limit is the only other end."""
    while not condition():  # noqa: ASYNC110 - the fake has no events to wait for
        await asyncio.sleep(0.005)


async def post_raw(url, body):
    """Send a request and return its open connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return reader, writer


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_while_queued_aborts(stream, n):
    engine = FakeEngine(gate=asyncio.Event())
    async with run_server(make_app(engine)) as url:
        _, writer = await post_raw(url, CHAT | {"stream": stream, "n": n})
        await eventually(lambda: len(engine.running) == n)
        writer.transport.abort()
        await eventually(lambda: not engine.running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_mid_answer_aborts(stream, n):
    engine = FakeEngine(delay_s=0.01)
    async with run_server(make_app(engine)) as url:
        reader, writer = await post_raw(
            url, CHAT | {"stream": stream, "n": n, "ignore_eos": True, "max_tokens": 200}
        )
        if stream:
            await reader.readuntil(b"data: ")
        await eventually(lambda: len(engine.running) == n)
        writer.transport.abort()
        await eventually(lambda: not engine.running)


async def test_a_client_that_reads_nothing_holds_back_its_own_stream_and_no_other():
    engine = FakeEngine(chunk_size=50, reply="the quick brown fox " * 40)
    body = CHAT | {"stream": True, "n": 16, "ignore_eos": True, "max_tokens": 200}
    async with run_server(make_app(engine)) as url:
        writers = [(await post_raw(url, body))[1] for _ in range(3)]
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        for writer in writers:
            writer.transport.abort()
        await eventually(lambda: not engine.running)


async def test_a_storm_of_leavers_leaves_nothing_behind():
    engine = FakeEngine(delay_s=0.005)
    app = make_app(engine)
    async with run_server(app) as url, httpx.AsyncClient(base_url=url) as client:
        connections = [
            await post_raw(url, CHAT | {"stream": i % 2 == 0, "n": 1 + i % 3}) for i in range(100)
        ]
        for i, (_, writer) in enumerate(connections):
            await asyncio.sleep(0.001 * (i % 5))
            writer.transport.abort()
        await eventually(lambda: not engine.running)
        before = len(asyncio.all_tasks())
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        metrics = samples((await client.get("/metrics")).text)
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
    ended = [value for key, value in metrics.items() if key[0] == "vllm:request_success_total"]
    assert sum(ended) == len(engine.submitted)


async def test_a_stream_that_ends_leaves_no_task_and_no_request():
    engine = FakeEngine()
    async with run_server(make_app(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        await client.get("/health")
        before = len(asyncio.all_tasks())
        for stream in (True, False):
            await client.post("/v1/chat/completions", json=CHAT | {"stream": stream, "n": 4})
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
    assert not engine.running
