"""GET /openapi.json says what is sent."""

import json

import jsonschema
import pytest

from tests.fakes import FakeEngine, make_app, make_client

pytestmark = pytest.mark.anyio

KEY = {"authorization": "Bearer k"}
TEXT = {"model": "tiny", "prompt": "a", "logprobs": 2, "n": 2}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "logprobs": True,
    "top_logprobs": 2,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def check(document, schema, instance):
    """Hold the instance to the schema, whose references lead into the document."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(
        instance
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/{name}", None, 200),
        ("GET", "/health", None, 200),
        ("GET", "/ready", None, 200),
        ("GET", "/version", None, 200),
        ("GET", "/bitwatt/v1/comparison", None, 200),
        ("GET", "/bitwatt/v1/comparison?since=x", None, 400),
        ("POST", "/v1/completions", TEXT, 200),
        ("POST", "/v1/completions", TEXT | {"prompt": []}, 400),
        ("POST", "/v1/completions", TEXT | {"model": "x"}, 404),
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/chat/completions", CHAT | {"messages": []}, 400),
        ("POST", "/tokenize", {"model": "tiny", "prompt": "a", "return_token_strs": True}, 200),
        ("POST", "/tokenize", {"model": "tiny"}, 400),
        ("POST", "/detokenize", {"model": "tiny", "tokens": [5]}, 200),
        ("POST", "/detokenize", {"model": "tiny", "tokens": [" " * 4000]}, 413),
    ],
)
async def test_every_answer_is_as_it_is_described(method, path, body, status):
    async with make_client(make_app(api_key="k", max_body_bytes=2048), headers=KEY) as client:
        document = (await client.get("/openapi.json")).json()
        url = path.replace("{name}", "tiny")
        response = await client.request(method, url, json=body)
        refused = await client.request(method, url, json=body, headers={"authorization": ""})
    operation = document["paths"][path.partition("?")[0]][method.lower()]
    assert response.status_code == status
    for answer in (response, refused):
        described = operation["responses"][str(answer.status_code)]
        media = described["content"][answer.headers["content-type"]]
        check(document, media["schema"], answer.json())
    if body is not None and status == 200:
        check(document, operation["requestBody"]["content"]["application/json"]["schema"], body)
    assert (refused.status_code == 200) is ("security" not in operation)


@pytest.mark.parametrize(("path", "body"), [("completions", TEXT), ("chat/completions", CHAT)])
async def test_every_event_of_a_stream_is_as_it_is_described(path, body):
    async with make_client(make_app()) as client:
        document = (await client.get("/openapi.json")).json()
        response = await client.post(f"/v1/{path}", json=body | STREAM)
    content = document["paths"][f"/v1/{path}"]["post"]["responses"]["200"]["content"]
    schema = content[response.headers["content-type"].partition(";")[0]]["schema"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    assert len(events) > 5
    for event in events:
        check(document, schema, json.loads(event))


async def test_an_engine_that_is_away_is_described_too():
    async with make_client(make_app(FakeEngine(is_ready=False, is_healthy=False))) as client:
        document = (await client.get("/openapi.json")).json()
        for method, path, body in (
            ("get", "/health", None),
            ("get", "/ready", None),
            ("post", "/v1/completions", TEXT),
        ):
            response = await client.request(method, path, json=body)
            assert response.status_code == 503
            described = document["paths"][path][method]["responses"]["503"]
            check(document, described["content"]["application/json"]["schema"], response.json())


async def test_nothing_is_described_that_is_never_sent():
    async with make_client(make_app()) as client:
        text = (await client.get("/openapi.json")).text
    assert '"422"' not in text
    assert "ValidationError" not in text
    assert '"schema":{}' not in text
