"""Random requests beside seeded streams: none is more than refused, and no stream sees them."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.end_to_end.random_requests import RandomRequest, random_requests
from tests.extent import TEST_ALL

pytestmark = pytest.mark.slow(200 if TEST_ALL else 20)

NUM_REQUESTS = int(os.environ.get("BITWATT_NUM_REQUESTS", 3_000 if TEST_ALL else 80))
AT_ONCE = 4
# Between a stream's end and its next beginning: in a quick run, other tests want the cores.
PAUSE_S = 0.0 if TEST_ALL else 0.5
TIMEOUT_S = 60
UNKNOWN_METHODS = ("BREW", "get")
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
STREAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"top_k": 20, "stop": ["return"]},
    {"top_p": 0.8, "min_p": 0.02},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.2},
    {"logit_bias": {"300": 5, "301": -100}, "min_tokens": 20},
    {"temperature": 0.3, "ignore_eos": True},
]


class Bytes(BytesIO):
    """What came over a connection, as http.client reads it."""

    def makefile(self, *_: object) -> BytesIO:
        return self


async def answer_to(port: int, request: RandomRequest) -> tuple[HTTPResponse, bytes] | None:
    """Return the whole answer; None of one that was dropped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        if request.is_dropped:
            await writer.drain()
            return None
        async with asyncio.timeout(TIMEOUT_S):
            data = await reader.read(-1)
    finally:
        writer.transport.abort()
    response = HTTPResponse(Bytes(data), method=request.method)  # type: ignore[arg-type]
    response.begin()
    return response, response.read()


LAST_EVENTS = {
    "/v1/messages": {"message_stop"},
    "/v1/responses": {"response.completed", "response.incomplete"},
}


def check(response: HTTPResponse, body: bytes, request: RandomRequest) -> None:
    refused = (501, 503, 529) if request.method in UNKNOWN_METHODS else (503, 529)
    assert response.status < 500 or response.status in refused, (response.status, body)
    kind = response.headers.get_content_type()
    path = request.target.partition("?")[0]
    if kind == "text/event-stream":
        *events, nothing = body.replace(b": keep-alive\n", b"").split(b"\n\n")
        assert nothing == b""
        if path not in LAST_EVENTS:
            assert events.pop() == b"data: [DONE]"
        told = [json.loads(event.partition(b"data: ")[2]) for event in events]
        assert all(one.get("error") is None and one.get("type") != "error" for one in told)
        if path in LAST_EVENTS:
            is_last = [one["type"] in LAST_EVENTS[path] for one in told]
            assert is_last.index(True) == len(told) - 1
    elif response.status >= 400 and request.method != "HEAD" and body:
        error = json.loads(body)["error"]
        assert error.keys() in ({"message", "type", "param", "code"}, {"message", "type"})
        # What the protocol refuses before a route is known has OpenAI's shape everywhere.
        assert "code" in error or path.startswith("/v1/messages")
    elif kind == "application/json" and body:
        json.loads(body)


class Asker:
    """Has AT_ONCE requests open, and begins the next as soon as one of them has ended.

    statuses  of the answers
    faults    requests whose answer no server may give, with what is wrong
    """

    def __init__(self, port: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.faults: list[tuple[RandomRequest, Exception]] = []
        self._port = port
        self._open: set[asyncio.Task[None]] = set()

    async def begin(self, requests: list[RandomRequest]) -> None:
        """Return once the last of them has begun."""
        for request in requests:
            await self._wait_until_fewer_than(AT_ONCE)
            self._open.add(asyncio.create_task(self._ask(request)))

    async def end(self) -> None:
        """Return once all have ended."""
        await self._wait_until_fewer_than(1)

    async def _wait_until_fewer_than(self, number: int) -> None:
        while len(self._open) >= number:
            _, self._open = await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)

    async def _ask(self, request: RandomRequest) -> None:
        try:
            answer = await answer_to(self._port, request)
            if answer is not None:
                response, body = answer
                self.statuses[response.status] += 1
                check(response, body, request)
        except Exception as error:
            self.faults.append((request, error))


async def stream(port: int, index: int) -> list[Any]:
    """Return all that a stream of a completion brings: texts, tokens, log-probabilities, ends."""
    asked = {"model": "builtin", "prompt": f"def function_{index}(", "seed": index, "logprobs": 1}
    asked |= {"max_tokens": 48, "stream": True} | STREAMS[index]
    headers = (("Content-Type", "application/json"),)
    request = RandomRequest("POST", "/v1/completions", headers, json.dumps(asked).encode(), False)
    answer = await answer_to(port, request)
    assert answer is not None
    response, body = answer
    assert response.status == 200, body
    brought = []
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
            brought.append(choice)
    return merged(brought)


def merged(choices: list[dict[str, Any]]) -> list[Any]:
    """Return the choice whole: how its tokens fall into events depends on the moment."""
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    return [
        "".join(choice["text"] for choice in choices),
        [token for entry in logprobs for token in entry["tokens"]],
        [value for entry in logprobs for value in entry["token_logprobs"]],
        [top for entry in logprobs for top in entry["top_logprobs"]],
        choices[-1]["finish_reason"],
    ]


async def streams_alone(port: int) -> list[list[Any]]:
    return [await stream(port, index) for index in range(len(STREAMS))]


class Streams:
    """Runs every stream over and over, and keeps each that differs from what it is alone."""

    def __init__(self, port: int, alone: list[list[Any]]) -> None:
        self.num_ended = [0] * len(alone)
        self.differing: list[object] = []
        self._port = port
        self._alone = alone
        self._is_over = Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = Thread(target=lambda: asyncio.run(self._run()))
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._repeat(index) for index in range(len(self._alone))))

    async def _repeat(self, index: int) -> None:
        while not self._is_over.is_set():
            try:
                brought = await stream(self._port, index)
                if brought != self._alone[index]:
                    self.differing.append((index, brought))
            except (AssertionError, HTTPException, KeyError, OSError) as error:
                self.differing.append((index, error))
            self.num_ended[index] += 1
            await asyncio.sleep(PAUSE_S)


def sums_of(server: Server) -> dict[str, float]:
    """Return every metric of the model the streams use, summed over its labels."""
    sums: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines():
        if 'model_name="builtin"' in line:
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            sums[name] = sums.get(name, 0.0) + value
    return sums


def wait_idle(server: Server) -> dict[str, float]:
    deadline = time.monotonic() + 30
    while True:
        sums = sums_of(server)
        if not any(sums[name] for name in GAUGES):
            return sums
        assert time.monotonic() < deadline, {name: sums[name] for name in GAUGES}
        time.sleep(0.1)


def check_counters(sums: dict[str, float]) -> None:
    num_ended = sums["vllm:request_success_total"]
    for name in ("e2e_request_latency_seconds", "request_generation_tokens"):
        assert sums[f"vllm:{name}_count"] == num_ended
    assert sums["vllm:generation_tokens_total"] >= sums["vllm:request_generation_tokens_sum"] > 0
    assert sums["vllm:prefix_cache_hits_total"] <= sums["vllm:prefix_cache_queries_total"]
    # As in vLLM: a prompt that is scored isn't looked up, one whose caller went away before its
    # first token isn't counted, and a step that draws nothing isn't one.
    assert sums["vllm:prefix_cache_queries_total"] > 0
    assert sums["vllm:prompt_tokens_total"] > 0
    assert 0 < sums["vllm:iteration_tokens_total_count"] <= sums["bitwatt_engine_steps_total"]
    assert sums["bitwatt_kv_cache_used_bytes"] == 0


@pytest.fixture
def shaken(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of its own, which mirrors some requests unasked; in a quick run, the shared one."""
    if not TEST_ALL:
        yield request.getfixturevalue("server")
        return
    flags = ("--max-queue", "5000", "--allow-priority", "--shadow-percent", "5")
    server = start_server(*flags, has_all_cores=True)
    yield server
    assert stop_server(server) == 0


@pytest.mark.timeout(3600 if TEST_ALL else 300)
def test_no_request_fails_the_server_or_changes_a_stream_beside_it(shaken: Server) -> None:
    server = shaken
    port = int(server.url.rsplit(":", 1)[1])
    engines = server.engine_ids()
    alone = asyncio.run(streams_alone(port))
    streams = Streams(port, alone)
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    asker = Asker(port)

    @settings(
        max_examples=NUM_REQUESTS // AT_ONCE,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(st.lists(random_requests(paths), min_size=AT_ONCE, max_size=AT_ONCE))
    def send(requests: list[RandomRequest]) -> None:
        runner.run(asker.begin(requests))
        assert asker.faults == []

    with asyncio.Runner() as runner, streams.running():
        send()
        runner.run(asker.end())
    assert asker.faults == []
    assert streams.differing == []
    assert all(streams.num_ended)
    assert server.engine_ids() == engines
    assert asker.statuses[200] > NUM_REQUESTS / 10, asker.statuses
    check_counters(wait_idle(server))
    assert not any(" ERROR " in line for line in server.log)
    print(asker.statuses, sum(streams.num_ended), "streams")
