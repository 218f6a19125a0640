"""What a caller gets for a request that can't be served: one shape, one status, a bounded text."""

import asyncio
import contextlib
import gzip
import json

import httpx
import pytest
from bitwatt.api import http_protocol
from bitwatt.api.http_protocol import MAX_HEAD_BYTES
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_text,
    make_tokenizer,
    run_server,
)

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "tiny", "prompt": "a"}


def message(**fields):
    return {"messages": [{"role": "user", "content": "a"} | fields]}


def error_of(response, status):
    """Return the error, having checked its shape."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert 0 < len(body["error"]["message"]) <= 1000
    return body["error"]


async def post(path, body, app=None, **headers):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    async with make_client(app or make_app()) as client:
        return await client.post(
            path, content=content, headers={"content-type": "application/json", **headers}
        )


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "nonsense",
        "[1]",
        '"text"',
        "null",
        '{"temperature": NaN}',
        '{"temperature": Infinity}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"model": "tiny", "prompt": "\\ud800"}',
        b"\xff\xfe",
        '{"max_tokens": ' + "9" * 10_000 + "}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_what_is_not_a_json_object_is_refused(path, body):
    error = error_of(await post(path, body), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a" * 500] * 5}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": "x" * 513}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 300}, "min_tokens"),
        ({"priority": 2**40}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"best_of": 2}, "best_of"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"store": True}, "store"),
        ({"max_tokens": 300}, "max_tokens"),
    ],
)
@pytest.mark.parametrize(("path", "valid"), [("completions", TEXT), ("chat/completions", CHAT)])
async def test_a_field_that_is_wrong_or_not_supported_is_named(path, valid, change, param):
    error = error_of(await post(f"/v1/{path}", valid | change), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": True}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        (message(role="wizard"), "messages[0].role"),
        (message(role="tool"), "messages[0].tool_call_id"),
        (message(content=None), "messages[0].content"),
        (message(content=5), "messages[0].content"),
        (message(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content"),
        (message(content=[{"type": "text"}]), "messages[0].content"),
        (message(content=[{"type": "refusal", "text": "no"}]), "messages[0].content"),
        (message(role="assistant", content=None, refusal=5), "messages[0].content"),
        (message(tool_calls=[{}]), "messages[0].tool_calls[0].id"),
        (message(content="a" * 5000), "messages"),
    ],
)
async def test_a_conversation_that_is_wrong_is_named(change, param):
    error = error_of(await post("/v1/chat/completions", CHAT | change), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 16}, "n"),
        ({"suffix": "b"}, "suffix"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1, "max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_a_prompt_that_is_wrong_is_named(change, param):
    error = error_of(await post("/v1/completions", TEXT | change), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"best_of": 1, "response_format": {"type": "text"}, "logit_bias": None},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None},
        {"top_k": -1, "temperature": 0, "frequency_penalty": 1},
    ],
)
@pytest.mark.parametrize(("path", "valid"), [("completions", TEXT), ("chat/completions", CHAT)])
async def test_options_that_ask_for_nothing_are_let_pass(path, valid, change):
    assert (await post(f"/v1/{path}", valid | change)).status_code == 200


async def test_a_prompt_beyond_the_context_is_refused_with_the_numbers_and_the_knob():
    error = error_of(await post("/v1/completions", TEXT | {"prompt": [5] * 256}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("prompt has 256 tokens; the limit is 256")
    assert "--max-model-len" in error["message"]


async def test_an_error_never_echoes_more_than_a_line_of_its_input():
    for body in (
        TEXT | {"temperature": "9" * 100_000},
        TEXT | {"logit_bias": {"x" * 100_000: 1}},
        TEXT | {"model": "m" * 250},
        TEXT | {"response_format": {"type": "x" * 100_000}},
        TEXT | {"prompt": ["a"] * 10 + [{"deep": "y" * 50_000}]},
        TEXT | {"stop_token_ids": ["z"] * 60},
        CHAT | {"messages": [{"role": "w" * 10_000, "content": "a"}] * 100},
    ):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await post(path, body)
        assert response.status_code in (400, 404)
        assert len(response.content) < 1000


async def test_a_model_that_is_not_served_is_404_with_those_that_are():
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        error = error_of(await post(f"/v1/{path}", body | {"model": "nope"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny" in error["message"]


async def test_paths_and_methods_that_are_not_there_have_the_same_body():
    async with make_client(make_app()) as client:
        assert error_of(await client.get("/nowhere"), 404)["code"] == "not_found"
        response = await client.get("/v1/completions")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"
        response = await client.request("BREW", "/v1/models")
        assert error_of(response, 405)
        assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/rerank", "/api/chat"])
async def test_a_route_of_other_servers_is_refused_with_those_that_models_answer_at(path):
    async with make_client(make_app()) as client:
        error = error_of(await client.post(path, json=CHAT), 404)
    assert error["code"] == "not_found"
    assert f"no route POST '{path}'; models answer at /v1/chat/completions" in error["message"]


async def test_a_slash_too_many_is_named():
    async with make_client(make_app()) as client:
        for method, path in (("GET", "/v1/models/"), ("POST", "/v1/chat/completions/")):
            error = error_of(await client.request(method, path), 404)
            assert error["code"] == "not_found"
            assert "without the slash" in error["message"]
        error = error_of(await client.get("/nowhere/"), 404)
        assert "without the slash" not in error["message"]


async def test_a_compressed_body_is_refused_by_its_encoding():
    body = gzip.compress(json.dumps(TEXT).encode())
    response = await post("/v1/completions", body, **{"content-encoding": "gzip"})
    assert "gzip" in error_of(response, 415)["message"]
    assert response.headers["accept-encoding"] == "identity"
    response = await post("/v1/completions", TEXT, **{"content-encoding": "identity"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", TEXT | {f"x{i}": 1 for i in range(120_000)}),
        (
            "/v1/chat/completions",
            CHAT | {"logit_bias": {f"x{i}": 1 for i in range(9999)}},
        ),
        ("/v1/chat/completions", CHAT | {"messages": [{}] * 400_000}),
        ("/v1/chat/completions", CHAT | {"tools": [[]] * 400_000}),
        ("/detokenize", {"model": "tiny", "tokens": [-1] * 400_000}),
        ("/v1/chat/completions", CHAT | {"messages": [{"x": 1}] * 1000}),
        ("/v1/completions", TEXT | {"stop_token_ids": [-1] * 64}),
    ],
)
async def test_checking_ends_at_the_first_of_many_errors(path, body, monkeypatch):
    errors = []
    build = RequestValidationError.__init__

    def counted(self, found, **rest):
        errors.extend(found)
        build(self, found, **rest)

    monkeypatch.setattr(RequestValidationError, "__init__", counted)
    error_of(await post(path, body), 400)
    assert len(errors) < 5


async def test_a_long_text_full_of_brackets_is_no_body_of_many_parts():
    text = '{"a": ["\\\\": ' * 100_000
    app = make_app(max_model_len=None)
    error = error_of(await post("/v1/completions", TEXT | {"prompt": text}, app), 400)
    assert error["code"] == "context_length_exceeded"
    unfinished = error_of(await post("/v1/completions", '{"prompt": "' + '\\"' * 900_000), 400)
    assert "not JSON" in unfinished["message"]


async def test_a_body_that_is_not_called_json_is_refused():
    response = await post(
        "/v1/completions", TEXT, **{"content-type": "application/x-www-form-urlencoded"}
    )
    assert "Content-Type" in error_of(response, 415)["message"]


async def test_an_unforeseen_failure_tells_nothing_but_the_request_id(caplog):
    text = make_text()
    app = make_app(text=text)
    text.codec.vocabulary = None
    response = await post("/v1/completions", TEXT, app, **{"x-request-id": "r1"})
    error = error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "NoneType" not in response.text
    assert response.headers["x-request-id"] == "r1"
    assert "request r1 failed" in caplog.text


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-123", True),
        ("a" * 129, False),
        ("with space", False),
        ("<script>", False),
        ("", False),
    ],
)
async def test_a_sane_request_id_comes_back_and_another_is_replaced(given, is_kept):
    async with make_client(make_app()) as client:
        response = await client.get("/health", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is is_kept
    assert len(response.headers.get_list("x-request-id")) == 1


async def test_a_body_over_the_limit_is_refused_declared_or_not():
    app = make_app(max_body_bytes=2048)

    async def pieces():
        for _ in range(100):
            yield b" " * 1024

    async with make_client(app) as client:
        declared = await client.post("/v1/completions", content=b" " * 3000)
        chunked = await client.post(
            "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
        )
    for response in (declared, chunked):
        error = error_of(response, 413)
        assert error["code"] == "request_too_large"
        assert "--max-body-bytes" in error["message"]


async def test_ten_megabytes_are_refused_by_a_real_server_which_serves_on():
    app = make_app()
    async with run_server(app) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/completions", content=b" " * 10_000_000)
        assert error_of(response, 413)
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_headers_without_end_are_cut_off(monkeypatch):
    monkeypatch.setattr(http_protocol, "LINGER_BYTES", 10 * MAX_HEAD_BYTES)
    async with run_server(make_app()) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        num_sent = 0
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and num_sent < 100 * MAX_HEAD_BYTES:
                writer.write(b"a" * 4096)
                await writer.drain()
                num_sent += 4096
                if num_sent == 2 * MAX_HEAD_BYTES:
                    assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
                await asyncio.sleep(0.001)
        writer.transport.abort()
    assert num_sent < 100 * MAX_HEAD_BYTES


async def test_heads_and_bodies_that_never_come_are_given_up(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.05)
    async with run_server(make_app(body_timeout=0.05)) as url:
        host, port = url.removeprefix("http://").split(":")
        host_and_type = b"Host: localhost\r\nContent-Type: application/json\r\n"
        body = b"POST /v1/completions HTTP/1.1\r\n" + host_and_type
        for sent, answer in (
            (b"", b""),
            (b"GET /health HTTP/1.1\r\n", b""),
            (body + b"Content-Length: 50\r\n\r\n{", b"HTTP/1.1 408"),
            (b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\nGET", b"HTTP/1.1 200"),
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            received = await reader.read()
            assert received.startswith(answer)
            assert bool(received) is bool(answer)
            writer.close()


async def test_headers_of_usual_size_pass_request_after_request():
    async with run_server(make_app()) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(5):
            response = await client.get("/health", headers={"x-padding": "a" * 30_000})
            assert response.status_code == 200


async def test_no_more_requests_are_read_than_may_be_open():
    engine = FakeEngine(gate=asyncio.Event())
    async with make_client(make_app(engine, max_open_requests=2)) as client:
        answers = [
            asyncio.create_task(client.post("/v1/completions", json=TEXT | {"stream": i == 0}))
            for i in range(2)
        ]
        while len(engine.running) < 2:  # noqa: ASYNC110 - the fake has no events to wait for
            await asyncio.sleep(0.005)
        refused = await client.post("/v1/completions", json=TEXT)
        assert "--max-open-requests" in error_of(refused, 503)["message"]
        assert refused.headers["retry-after"]
        assert (await client.get("/health")).status_code == 200
        engine.gate.set()
        for answer in await asyncio.gather(*answers):
            assert answer.status_code == 200
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_a_stream_that_fails_midway_tells_nothing_and_is_logged(caplog):
    engine = FakeEngine(delay_s=0.01)
    text = TextProcessor(TextCodec(make_tokenizer()))  # nobody else's

    async with (
        run_server(make_app(engine, text=text)) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        text.vocabulary.token_bytes[:] = [None] * len(text.vocabulary)
        rest = [line async for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert f"request {response.headers['x-request-id']} failed midway" in caplog.text
    assert not engine.running


async def test_while_the_engine_is_away_requests_are_told_to_come_again():
    engine = FakeEngine(info=None, is_ready=False)
    response = await post("/v1/completions", TEXT, make_app(engine))
    assert error_of(response, 503)["code"] == "engine_unavailable"
    assert response.headers["retry-after"]


@given(
    st.dictionaries(
        st.sampled_from(
            ["prompt", "n", "stop", "seed", "logit_bias", "stream", "max_tokens", "echo", "x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_body_gets_an_answer_or_a_named_refusal(fields):
    response = asyncio.run(post("/v1/completions", TEXT | fields))
    if response.status_code != 200:
        error_of(response, 400)
