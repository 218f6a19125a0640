"""Every response, errors too, as a strict parser of HTTP/1.1 (h11) reads it: RFC 9110 and 9112."""

import asyncio
from email.utils import parsedate_to_datetime

import h11
import pytest

from tests.fakes import FakeEngine, make_app, run_server

pytestmark = pytest.mark.anyio

JSON = "application/json"
BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 4}'
STREAM = b'{"model": "tiny", "prompt": "a", "max_tokens": 4, "stream": true}'


def post(path: str, body: bytes = BODY, *fields: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *fields]
    if not any(field.lower().startswith("content-type") for field in fields):
        head.append(f"Content-Type: {JSON}")
    return "\r\n".join([*head, "", ""]).encode() + body


def get(path: str, method: str = "GET", *fields: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


async def read_answer(url: str, request: bytes, method: str) -> tuple[h11.Response, bytes]:
    """Return the one answer to the request, and its body, as h11 reads them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    client = h11.Connection(h11.CLIENT)
    # h11 won't send what is wrong, so it is told of a right request and the wrong one goes out.
    client.send(h11.Request(method=method, target="/", headers=[("Host", "localhost")]))
    client.send(h11.EndOfMessage())
    try:
        writer.write(request)
        response, body = None, b""
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(await asyncio.wait_for(reader.read(65536), 20))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                assert isinstance(event, h11.EndOfMessage), event
                assert response is not None
                return response, body
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (get("/v1/models"), 200, JSON),
        (get("/v1/models", "HEAD"), 200, JSON),
        (get("/metrics", "HEAD"), 200, "text/plain"),
        (get("/"), 200, "text/html"),
        (get("/metrics"), 200, "text/plain"),
        (get("/openapi.json"), 200, JSON),
        (get("/version"), 200, JSON),
        (post("/v1/completions"), 200, JSON),
        (post("/v1/completions", STREAM), 200, "text/event-stream"),
        (post("/v1/completions", b"{"), 400, JSON),
        (post("/v1/completions", BODY, "Content-Type: text/plain"), 415, JSON),
        (post("/v1/completions", BODY, "Content-Encoding: gzip"), 415, JSON),
        (post("/v1/completions", BODY, "Content-Encoding: identity, gzip"), 415, JSON),
        (
            post("/v1/completions", BODY, "Content-Encoding: identity", "Content-Encoding: br"),
            415,
            JSON,
        ),
        (post("/v1/completions", BODY, "Content-Encoding: Identity,"), 200, JSON),
        (post("/v1/completions", BODY, "Content-Encoding:"), 200, JSON),
        (post("/v1/completions", b"[" * 3000), 413, JSON),
        (post("/v1/completions", BODY.replace(b"tiny", b"none")), 404, JSON),
        (get("/nowhere"), 404, JSON),
        (get("/v1/models/"), 404, JSON),
        (get("/v1/completions"), 405, JSON),
        (get("/v1/models", "DELETE"), 405, JSON),
        (get("/v1/models", "OPTIONS"), 405, JSON),
        (get("/v1/models", "GET", "Host: other"), 400, JSON),
        (get("/" + "a" * 70_000), None, JSON),
        (get("/", "GET", "A: " + "a" * 70_000), 431, JSON),
        (b"GET / HTTP/1.1\r\n\r\n", 400, JSON),
        (b"nonsense\r\n\r\n", 400, JSON),
        (b"GET / HTTP/3.7\r\nHost: localhost\r\n\r\n", None, JSON),
        (post("/v1/completions", BODY, "Transfer-Encoding: chunked"), 400, JSON),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_an_answer_parses_and_says_what_it_is(request_, status, kind):
    method = request_.partition(b" ")[0].decode()
    method = method if method in ("HEAD", "OPTIONS", "POST", "DELETE") else "GET"
    async with run_server(make_app(FakeEngine(), max_body_bytes=2048)) as url:
        response, body = await read_answer(url, request_, method)
    headers: dict[str, list[str]] = {}
    for name, value in response.headers:
        headers.setdefault(name.decode(), []).append(value.decode())
    if status is None:
        assert 400 <= response.status_code < 600
    else:
        assert response.status_code == status, body
    assert headers["content-type"][0].partition(";")[0] == kind
    assert headers["x-content-type-options"] == ["nosniff"]
    for once in ("date", "x-request-id", "content-type"):
        assert len(headers[once]) == 1, once
    assert parsedate_to_datetime(headers["date"][0]).tzinfo is not None
    framing = [name for name in ("content-length", "transfer-encoding") if name in headers]
    assert len(framing) == 1
    if "content-length" in headers and method != "HEAD":
        assert int(headers["content-length"][0]) == len(body)
    if method == "HEAD":
        assert body == b""
    if response.status_code == 405:
        assert headers["allow"]
