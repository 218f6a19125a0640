"""What a connection takes and bears: RFC 9110 and 9112, and callers who keep to neither."""

import asyncio
import json
import re
import resource
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import httpx
import openai
import pytest
from bitwatt.api import http_protocol

from tests.fakes import FakeEngine, make_app, run_server
from tests.server.api.test_disconnects import eventually, samples

pytestmark = pytest.mark.anyio

BODY = json.dumps({"model": "tiny", "prompt": "a"}).encode()
STREAM = json.dumps({"model": "tiny", "prompt": "a", "stream": True}).encode()
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
)


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}  # as `bitwatt serve` has it


def post(body=BODY, *headers, path=b"/v1/completions", version=b"1.1"):
    """Return a request as it goes over the wire."""
    lines = [
        b"POST %b HTTP/%b" % (path, version),
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join([*lines, b"", body])


@asynccontextmanager
async def connect(url, *pieces):
    """Open a connection and send the pieces, each in a segment of its own."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if piece is not pieces[-1]:
                await asyncio.sleep(0.05)
        yield reader, writer
    finally:
        writer.transport.abort()


async def answers_to(url, *pieces):
    """Return all that comes back until the server closes."""
    async with connect(url, *pieces) as (reader, _):
        return await reader.read()


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", received)]


def refusal(received, status):
    """Return the message of the refusal that is all that was received."""
    assert statuses(received) == [status], received
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"x-request-id: " in head
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    return json.loads(body)["error"]["message"]


async def test_a_trailer_is_refused_and_never_a_header():
    async with run_server(make_app(api_key="k")) as url:
        trailer = b"Authorization: Bearer k\r\n\r\n"
        assert statuses(await answers_to(url, CHUNKED + trailer + LAST_GET)) == [401]
        keyed = CHUNKED.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer k\r\n\r\n", 1)
        for pieces in ([keyed + trailer], [keyed, trailer], [keyed, b"a:b\r\n" * 1000]):
            assert "trailers" in refusal(await answers_to(url, *pieces), 400)
        assert statuses(await answers_to(url, keyed + b"\r\n" + LAST_GET)) == [200, 401]


@pytest.mark.parametrize(
    "beginning",
    [CHUNKED, CHUNKED + b"a:", CHUNKED[:-3] + b"1;", CHUNKED[:-3] + b"1;a=", b"\r\n"],
    ids=["a trailer's name", "a trailer", "an extension", "its value", "nothing"],
)
async def test_what_has_no_end_is_refused_before_it_fills_the_memory(beginning, monkeypatch):
    monkeypatch.setattr(http_protocol, "LINGER_BYTES", 2**20)
    unit = b"\r\n" if beginning == b"\r\n" else b"a"
    num_sent = 0
    async with run_server(make_app()) as url, connect(url, beginning) as (reader, writer):
        with suppress(ConnectionError):
            while num_sent < 2**26:
                writer.write(unit * 2**14)
                await writer.drain()
                num_sent += len(unit) * 2**14
                await asyncio.sleep(0)
        received = b""
        with suppress(ConnectionError):
            received = await reader.read()
        assert num_sent < 2**26
        assert not received or statuses(received) == [400]


async def test_trailers_that_never_end_are_given_up():
    async with run_server(make_app(body_timeout=0.05)) as url:
        assert "--body-timeout" in refusal(await answers_to(url, CHUNKED + b"a"), 408)


async def test_protocol_errors_are_counted():
    async with run_server(make_app()) as url:
        await answers_to(url, b"nonsense\r\n\r\n")
        await answers_to(url, CHUNKED + b"a:b\r\n\r\n")
        async with httpx.AsyncClient(base_url=url) as client:
            counts = samples((await client.get("/metrics")).text)
    refused = [key for key in counts if key[0] == "http_requests_total" and ("code", "400") in key]
    assert len(refused) == 2


UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")


@pytest.mark.parametrize("is_split", [True, False])
async def test_a_wish_to_upgrade_is_ignored_and_the_body_read(is_split):
    engine = FakeEngine()
    async with run_server(make_app(engine)) as url:
        head, body = post(BODY, *UPGRADE).split(b"\r\n\r\n")
        head += b"\r\n\r\n"
        pieces = (head[:9], head[9:], body, LAST_GET) if is_split else (head + body + LAST_GET,)
        assert statuses(await answers_to(url, *pieces)) == [200, 200]
        chunked = CHUNKED.replace(b"\r\n\r\n", b"\r\n" + b"\r\n".join(UPGRADE) + b"\r\n\r\n", 1)
        assert statuses(await answers_to(url, chunked + b"\r\n" + LAST_GET)) == [200, 200]
        get = GET.replace(b"\r\n\r\n", b"\r\n" + b"\r\n".join(UPGRADE) + b"\r\n\r\n")
        assert statuses(await answers_to(url, get * 3 + LAST_GET)) == [200] * 4
    assert len(engine.submitted) == 2


@pytest.mark.parametrize("is_split", [True, False])
async def test_the_body_of_a_wish_to_upgrade_is_no_request(is_split):
    async with run_server(make_app()) as url:
        head, body = post(LAST_GET, *UPGRADE).split(b"\r\n\r\n", 1)
        pieces = (head + b"\r\n\r\n", body) if is_split else (head + b"\r\n\r\n" + body,)
        received = await answers_to(url, *pieces, GET.replace(b"GET", b"BREW"))
        assert statuses(received) == [400, 501]
        assert b"not JSON" in received


async def test_a_folded_header_of_a_wish_to_upgrade_smuggles_nothing():
    async with run_server(make_app()) as url:
        folded = post(BODY, *UPGRADE, b"X: a\r\n Transfer-Encoding: chunked")
        assert statuses(await answers_to(url, folded + LAST_GET)) in ([200, 200], [400])


@pytest.mark.parametrize(
    ("request_", "status", "named"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, "HTTP/1.1"),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\nrest", 501, "CONNECT"),
        (b"GET nowhere: HTTP/1.1\r\nHost: a\r\n\r\n", 400, "HTTP"),
        (post(BODY, b"Transfer-Encoding: chunked"), 400, "HTTP"),
        (post(BODY, b"Content-Length: 3"), 400, "HTTP"),
        (post(BODY, b"Transfer-Encoding : chunked"), 400, "HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 300 + b"\r\n", 431, "headers"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: [a\r\n\r\n", 400, "Host"),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501, "method"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "16384"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nB: " + b"b" * 66_000 + b"\r\n\r\n", 431, "65536"),
        (CHUNKED.replace(b"Transfer", b"Transfer-Encoding: gzip\r\nTransfer"), 501, "chunked"),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "no path"),
        (b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "no path"),
        (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "no path"),
        (b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "HTTP"),
        (b"GET http:///version HTTP/1.1\r\nHost: a\r\n\r\n", 400, "names no host"),
        (b"GET http://localhost@a/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "names no host"),
        (b"GET http://localhost/ HTTP/1.1\r\n\r\n", 400, "Host"),
    ],
)
async def test_what_is_not_a_request_is_refused_with_the_reason(request_, status, named):
    async with run_server(make_app()) as url:
        assert named in refusal(await answers_to(url, request_ + GET), status)


@pytest.mark.parametrize(
    ("codings", "status"),
    [
        (b"chunked", 200),
        (b"Chunked", 200),
        (b"\tchunked ", 200),
        (b"gzip, chunked", 501),
        (b"identity, chunked", 501),
        (b"gzip;q=1, chunked", 501),
        (b"gzip", 400),
        (b"identity", 400),
        (b"chunked, gzip", 400),
        (b"chunked, chunked", 400),
        (b"chunked;q=1", 400),
        (b"xchunked", 400),
        (b"", 400),
    ],
)
async def test_a_body_in_a_coding_that_is_not_understood_is_no_body(codings, status):
    """RFC 9112, 6.1 and 6.3: 501 where its end is known, 400 where it isn't."""
    engine = FakeEngine()
    async with run_server(make_app(engine)) as url:
        request = CHUNKED.replace(b"chunked", codings) + b"\r\n"
        answers = statuses(await answers_to(url, request + LAST_GET))
    assert answers == ([200, 200] if status == 200 else [status])
    assert len(engine.submitted) == (status == 200)


async def test_http_1_0_has_no_transfer_encoding():
    async with run_server(make_app()) as url:
        request = CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n"
        assert "HTTP/1.0" in refusal(await answers_to(url, request), 400)


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        (b"http://evil.example/version", b"localhost", 421),
        (b"https://evil.example:443/version", b"localhost", 421),
        (b"http://localhost/version", b"localhost", 200),
        (b"HTTP://LOCALHOST:80/version", b"localhost", 200),
        (b"http://[::1]:8000/version", b"evil.example", 200),
        (b"http://localhost?a=b", b"localhost", 200),
        (b"//evil.example/version", b"localhost", 404),
        (b"/version", b"localhost ", 200),
    ],
)
async def test_a_host_in_the_target_is_the_one_that_counts(target, host, status):
    """RFC 9112, 3.2.2: the Host header beside it is ignored."""
    request = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (target, host)
    async with run_server(make_app()) as url:
        assert statuses(await answers_to(url, request)) == [status]


async def test_options_of_the_whole_server_name_its_methods():
    async with run_server(make_app()) as url:
        received = await answers_to(url, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
    refusal(received, 405)
    assert b"allow: GET, HEAD, POST\r\n" in received


async def test_a_stream_over_http_1_0_ends_with_its_connection():
    async with run_server(make_app()) as url:
        received = await answers_to(url, post(STREAM, version=b"1.0"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b'data: {"id"')
    assert body.endswith(b"data: [DONE]\n\n")


async def test_requests_in_a_row_are_answered_in_their_order():
    async with run_server(make_app()) as url:
        requests = [GET, post(), b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", LAST_GET]
        for pieces in (requests, [b"".join(requests)]):
            assert statuses(await answers_to(url, *pieces)) == [200, 200, 404, 200]


@pytest.mark.parametrize(
    "behind", [GET, GET * 1000, post(b" " * 10**6)], ids=["one", "many", "a long body"]
)
async def test_a_request_behind_another_does_not_hide_that_the_client_left(behind):
    engine = FakeEngine(gate=asyncio.Event())
    async with run_server(make_app(engine)) as url:
        async with connect(url, post(STREAM), behind):
            await eventually(lambda: engine.running)
        await eventually(lambda: not engine.running)


async def test_only_so_many_requests_wait_behind_another():
    engine = FakeEngine(gate=asyncio.Event())
    async with run_server(make_app(engine)) as url, connect(url, post(), GET * 1000) as (reader, _):
        await eventually(lambda: engine.running)
        engine.gate.set()
        received = await reader.read()
    assert statuses(received) == [200] * (1 + http_protocol.MAX_PIPELINED)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([], []),
        ([b"GET /version"], []),
        ([GET], [200]),
        ([GET, b"\r\n"], [200]),
        ([GET, b"GET /v"], [200]),
        ([post(b" " * 1000)[:-900]], [408]),
        ([CHUNKED], [408]),
        ([post(b" " * 3000)[:-1]], [413]),
        ([b"nonsense\r\n"], [400]),
        ([GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n")], [408]),
    ],
    ids=[
        "nothing",
        "a request line",
        "a request",
        "an empty line after a request",
        "the next request's head",
        "a body",
        "a trailer",
        "a body that was refused",
        "no HTTP",
        "a body of a GET",
    ],
)
async def test_no_state_of_a_connection_is_for_ever(sent, status, monkeypatch):
    """A byte every while keeps none of them open."""
    for name in ("HEAD_S", "IDLE_S", "LINGER_S"):
        monkeypatch.setattr(http_protocol, name, 0.2)
    app = make_app(body_timeout=0.2, max_body_bytes=2048)
    async with run_server(app) as url, connect(url, *sent) as (reader, writer):
        received = asyncio.create_task(reader.read())
        drip = b"\r\n" if sent == [GET, b"\r\n"] else b"x"
        while sent and not received.done():
            writer.write(drip)
            await asyncio.sleep(0.05)
        with suppress(ConnectionError):
            assert statuses(await received) in (status, [*status, 400])


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch):
    monkeypatch.setattr(http_protocol, "UNREAD_S", 0.1)
    engine = FakeEngine(chunk_size=50, reply="the quick brown fox " * 40)
    stream = json.loads(STREAM) | {"n": 128, "ignore_eos": True, "max_tokens": 250, "logprobs": 20}
    requests = [post(json.dumps(stream).encode())] * 4
    async with run_server(make_app(engine)) as url, connect(url, *requests):
        await eventually(lambda: engine.submitted)
        await eventually(lambda: not engine.running)


async def test_beyond_the_limit_of_connections_those_that_owe_us_bytes_make_room():
    engine = FakeEngine(gate=asyncio.Event())
    async with (
        run_server(make_app(engine), max_connections=3) as url,
        connect(url, post(STREAM)) as (stream, _),
        connect(url, GET) as (idle, _),
        connect(url, post()[:-3]) as (unfinished, _),
    ):
        await eventually(lambda: engine.running)
        await idle.readuntil(b"}")
        for _ in range(20):
            async with connect(url, GET) as (reader, _):
                await reader.readuntil(b"}")
        for reader in (idle, unfinished):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        engine.gate.set()
        assert b"[DONE]" in await stream.readuntil(b"0\r\n\r\n")


async def test_beyond_the_limit_of_connections_at_work_a_newcomer_is_told():
    engine = FakeEngine(gate=asyncio.Event())
    async with (
        run_server(make_app(engine), max_connections=2) as url,
        connect(url, post(STREAM)) as (a, _),
        connect(url, post(STREAM)) as (b, _),
    ):
        await eventually(lambda: len(engine.running) == 2)
        for _ in range(20):
            assert "--max-connections" in refusal(await answers_to(url, b""), 503)
        engine.gate.set()
        for stream in (a, b):
            assert b"[DONE]" in await stream.readuntil(b"0\r\n\r\n")
        await eventually(lambda: not engine.running)
        assert statuses(await answers_to(url, LAST_GET)) == [200]


@pytest.mark.parametrize("num_bytes", [3_000_000, 10_000_000, 40_000_000])
async def test_a_client_that_sends_too_much_gets_to_read_so(num_bytes):
    messages = [{"role": "user", "content": "a" * num_bytes}]
    async with (
        run_server(make_app()) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIStatusError, match="--max-body-bytes") as caught:
            await client.chat.completions.create(model="tiny", messages=messages)
        assert caught.value.status_code == 413
        assert (await client.models.list()).data


async def test_a_body_that_was_refused_is_read_to_its_end_and_the_connection_kept():
    async with run_server(make_app(max_body_bytes=2048)) as url:
        pieces = [post(b" " * 10**6)[: 5 * 10**5], post(b" " * 10**6)[5 * 10**5 :] + LAST_GET]
        assert statuses(await answers_to(url, *pieces)) == [413, 200]


async def test_what_is_sent_after_a_refusal_is_bounded(monkeypatch):
    monkeypatch.setattr(http_protocol, "LINGER_BYTES", 2**20)
    async with run_server(make_app(max_body_bytes=2048)) as url, connect(url) as (_, writer):
        num_sent = 0
        writer.write(post(b" " * 10**8)[:1000])
        with suppress(ConnectionError):
            while num_sent < 10**8:
                writer.write(b" " * 2**16)
                await writer.drain()
                num_sent += 2**16
    assert num_sent < 10**8


async def test_a_body_that_waits_for_leave_is_refused_without_one():
    async with run_server(make_app(max_body_bytes=2048)) as url:
        head, body = post(b" " * 3000, b"Expect: 100-continue").split(b"\r\n\r\n")
        assert statuses(await answers_to(url, head + b"\r\n\r\n")) == [413]
        head, body = post(BODY, b"Expect: 100-continue", b"Connection: close").split(b"\r\n\r\n")
        async with connect(url, head + b"\r\n\r\n") as (reader, writer):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert statuses(await reader.read()) == [200]


async def test_leave_is_given_only_where_that_is_expected():
    async with run_server(make_app()) as url:
        request = post(BODY, b"Expect: a-wonder", b"Connection: close")
        assert statuses(await answers_to(url, request)) == [200]


@pytest.mark.parametrize(
    "host", [b"", b"a", b"a:80", b"a:", b"127.0.0.1:80", b"[::1]:80", b"a_b.c-d", b"%C3%A9"]
)
async def test_every_form_of_a_host_is_taken(host):
    request = LAST_GET.replace(b"localhost", host)
    async with run_server(make_app(allowed_hosts="*")) as url:
        assert statuses(await answers_to(url, request)) == [200]


async def test_unfinished_bodies_take_no_place_of_requests():
    async with run_server(make_app(max_open_requests=1)) as url, connect(url, post()[:-3]):
        assert statuses(await answers_to(url, post() + LAST_GET)) == [200, 200]


async def test_connections_leave_files_for_the_rest_of_the_process(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (102, 102))
    async with run_server(make_app()) as url, AsyncExitStack() as opened:
        readers = []
        for _ in range(6):
            reader, _ = await opened.enter_async_context(connect(url, GET))
            await reader.readuntil(b"}")
            readers.append(reader)
        assert not any(reader.at_eof() for reader in readers)
        assert statuses(await answers_to(url, LAST_GET)) == [200]
        with suppress(ConnectionError):
            assert await readers[0].read() == b""
