"""GET /openapi.json says what is sent."""

import json
from functools import cache

import jsonschema
import pytest

from tests.fakes import FakeEngine, make_app, make_client
from tests.server.api.test_tools import CALL, THINKER, info_of, make_tools_text

pytestmark = pytest.mark.anyio

KEY = {"authorization": "Bearer k"}
TEXT = {"model": "tiny", "prompt": "a", "logprobs": 2, "n": 2}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "logprobs": True,
    "top_logprobs": 2,
}
RESPONSE = {"model": "tiny", "input": "a", "max_output_tokens": 3}
MESSAGE = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_tokens": 3,
}
EMBED = {"model": "tiny", "input": ["a", "the fox"], "dimensions": 4}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@cache
def plain_app():
    """Return one application for many tests: it writes its document once, for 0.15 s."""
    return make_app()


@cache
def keyed_app():
    return make_app(api_key="k", max_body_bytes=2048)


def check(document, schema, instance):
    """Hold the instance to the schema, whose references lead into the document."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(
        instance
    )


ANSWERS = [
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
    ("POST", "/v1/responses", RESPONSE, 200),
    ("POST", "/v1/responses", RESPONSE | {"input": []}, 400),
    ("POST", "/v1/messages", MESSAGE, 200),
    ("POST", "/v1/messages", MESSAGE | {"model": "x"}, 404),
    ("POST", "/v1/messages/count_tokens", MESSAGE, 200),
    ("POST", "/tokenize", {"model": "tiny", "prompt": "a", "return_token_strs": True}, 200),
    ("POST", "/tokenize", {"prompt": "a", "model": None}, 200),
    ("POST", "/tokenize", {"model": "tiny"}, 400),
    ("GET", "/tokenizer_info", None, 200),
    ("GET", "/tokenizer_info?model=tiny", None, 200),
    ("GET", "/tokenizer_info?model=x", None, 404),
    ("POST", "/v1/embeddings", EMBED, 200),
    ("POST", "/v1/embeddings", EMBED | {"encoding_format": "base64"}, 200),
    ("POST", "/v1/embeddings", EMBED | {"input": []}, 400),
    ("POST", "/detokenize", {"model": "tiny", "tokens": [5]}, 200),
    ("POST", "/detokenize", {"model": "tiny", "tokens": [" " * 4000]}, 413),
]


def test_every_route_of_the_document_is_described_and_asked():
    paths = make_app().openapi()["paths"]
    text = {
        path
        for path, operations in paths.items()
        if any("text/plain" in of["responses"]["200"]["content"] for of in operations.values())
    }
    assert text == {"/metrics"}, "add the others to _ANSWERS of server/bitwatt/api/openapi.py"
    asked = {path.partition("?")[0] for _, path, _, _ in ANSWERS}
    assert paths.keys() - text == asked, "add it to ANSWERS"


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
async def test_every_answer_is_as_it_is_described(method, path, body, status):
    async with make_client(keyed_app(), headers=KEY) as client:
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
    async with make_client(plain_app()) as client:
        document = (await client.get("/openapi.json")).json()
        response = await client.post(f"/v1/{path}", json=body | STREAM)
    content = document["paths"][f"/v1/{path}"]["post"]["responses"]["200"]["content"]
    event_schema = content[response.headers["content-type"].partition(";")[0]]["schema"]
    schema = event_schema["properties"]["data"]["anyOf"][0]["contentSchema"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    assert len(events) > 5
    for event in events:
        check(document, schema, json.loads(event))


@pytest.mark.parametrize(("path", "body"), [("responses", RESPONSE), ("messages", MESSAGE)])
@pytest.mark.parametrize("engine", [FakeEngine(), FakeEngine(dies_after=2)])
async def test_every_named_event_of_a_stream_is_as_it_is_described(path, body, engine):
    async with make_client(make_app(engine)) as client:
        document = (await client.get("/openapi.json")).json()
        response = await client.post(f"/v1/{path}", json=body | {"stream": True})
    content = document["paths"][f"/v1/{path}"]["post"]["responses"]["200"]["content"]
    schema = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][0]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if "data" in line]
    assert len(lines) > 5
    for line in lines:
        check(document, schema["contentSchema"], json.loads(line))


@pytest.mark.parametrize(("path", "body"), [("responses", RESPONSE), ("messages", MESSAGE)])
async def test_calls_and_thinking_are_described_too(path, body):
    text = make_tools_text(THINKER)
    engine = FakeEngine(reply=f"<think>hm</think>so {CALL}", info=info_of(text))
    tool = {"name": "weather", "input_schema": {}}
    if path == "responses":
        tool = {"name": "weather", "type": "function"}
    limit = {"max_tokens": 200} if path == "messages" else {"max_output_tokens": 200}
    async with make_client(make_app(engine, text=text)) as client:
        document = (await client.get("/openapi.json")).json()
        asked = body | limit | {"tools": [tool]}
        whole = await client.post(f"/v1/{path}", json=asked)
        stream = await client.post(f"/v1/{path}", json=asked | {"stream": True})
    operation = document["paths"][f"/v1/{path}"]["post"]
    check(document, operation["requestBody"]["content"]["application/json"]["schema"], asked)
    content = operation["responses"]["200"]["content"]
    check(document, content["application/json"]["schema"], whole.json())
    data = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][0]
    lines = [line.removeprefix("data: ") for line in stream.text.split("\n") if "data: " in line]
    assert "weather" in stream.text
    for line in lines:
        check(document, data["contentSchema"], json.loads(line))


@pytest.mark.parametrize(
    ("knob", "security"),
    [("api_key", [{"key": []}]), ("api_key_file", [{"key": []}]), (None, [{}, {"key": []}])],
)
async def test_the_document_says_which_models_there_are_and_whether_a_key_is_needed(
    knob, security, tmp_path
):
    (tmp_path / "keys").write_text("k\n")
    values = {"api_key": "k", "api_key_file": str(tmp_path / "keys")}
    settings = {} if knob is None else {knob: values[knob]}
    async with make_client(make_app(**settings), headers=KEY) as client:
        document = (await client.get("/openapi.json")).json()
    assert document["paths"]["/v1/completions"]["post"]["security"] == security
    assert "security" not in document["paths"]["/health"]["get"]
    [name] = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    assert name["schema"]["enum"] == ["tiny"]
    [name] = document["paths"]["/tokenizer_info"]["get"]["parameters"]
    assert name["schema"]["enum"] == ["tiny"]
    for body in ("ChatBody", "CompletionBody", "EmbeddingBody", "TokenizeBody", "DetokenizeBody"):
        schema = document["components"]["schemas"][body]
        names = schema["properties"]["model"]["enum"]
        assert names == (["tiny"] if "model" in schema.get("required", ()) else ["tiny", None])
        assert schema["example"]["model"] == "tiny"
        check(document, schema, schema["example"])


@pytest.mark.parametrize(
    ("path", "body", "is_right"),
    [
        ("completions", TEXT | {"prompt": ["a", "b"], "n": 64}, True),
        ("completions", TEXT | {"stop": ["a" * 100] * 20}, True),
        ("completions", TEXT | {"stop": [""]}, False),
        ("completions", TEXT | {"max_tokens": 0}, False),
        ("completions", TEXT | {"max_tokens": 0, "echo": False}, False),
        ("completions", TEXT | {"max_tokens": 0, "echo": True}, True),
        ("completions", TEXT | {"max_tokens": 0, "prompt_logprobs": 0}, True),
        ("completions", TEXT | {"prompt_logprobs": 0, "stream": True}, False),
        ("completions", TEXT | {"prompt_logprobs": None, "stream": True}, True),
        ("completions", TEXT | {"prompt_logprobs": 0, "stream": False}, True),
        ("chat/completions", CHAT | {"max_completion_tokens": 0}, False),
        ("chat/completions", CHAT | {"max_tokens": 0, "prompt_logprobs": None}, False),
        ("chat/completions", CHAT | {"max_tokens": 0, "prompt_logprobs": 2}, True),
        ("completions", TEXT | {"stream_options": {}}, False),
        ("completions", TEXT | {"stream_options": {}, "stream": True}, True),
        ("chat/completions", CHAT | {"logprobs": False}, False),
        ("chat/completions", CHAT | {"max_tokens": 4, "max_completion_tokens": None}, True),
        ("chat/completions", CHAT | {"max_tokens": 4, "max_completion_tokens": 5}, False),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"thinking": True}}, True),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"colour": True}}, False),
    ],
)
async def test_a_body_is_right_by_the_document_where_it_is_taken(path, body, is_right):
    async with make_client(plain_app()) as client:
        document = (await client.get("/openapi.json")).json()
        status = (await client.post(f"/v1/{path}", json=body)).status_code
    content = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": document["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is is_right
    assert status == (200 if is_right else 400)


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


def keywords(schema):
    """Yield every keyword of a schema and of those in it."""
    for name, value in schema.items():
        yield name
        match name, value:
            case (("properties" | "$defs" | "patternProperties" | "dependentSchemas"), dict()):
                for inner in value.values():
                    yield from keywords(inner)
            case (("const" | "default" | "enum" | "examples" | "example" | "discriminator"), _):
                pass
            case _, dict():
                yield from keywords(value)
            case _, list():
                for inner in value:
                    if isinstance(inner, dict):
                        yield from keywords(inner)


async def test_a_bound_is_written_in_json_schemas_words():
    # A bound that pydantic can't place, as on a union, stood there as `ge` and said nothing.
    async with make_client(plain_app()) as client:
        document = (await client.get("/openapi.json")).json()
    validator = jsonschema.Draft202012Validator
    known = set(validator.VALIDATORS) | set(validator.META_SCHEMA["properties"]) | {"$ref"}
    known |= {"$defs", "title", "description", "default", "examples", "example", "discriminator"}
    known |= {"then", "else", "format", "nullable", "deprecated", "readOnly", "writeOnly"}
    found = {k for schema in document["components"]["schemas"].values() for k in keywords(schema)}
    assert found <= known


async def test_nothing_is_described_that_is_never_sent():
    async with make_client(plain_app()) as client:
        text = (await client.get("/openapi.json")).text
    assert '"422"' not in text
    assert "ValidationError" not in text
    assert '"schema":{}' not in text


async def test_every_answer_and_error_has_an_example_that_is_as_it_is_described():
    async with make_client(plain_app()) as client:
        document = (await client.get("/openapi.json")).json()
    num_examples = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                media = answer["content"].get("application/json", {})
                if "example" in media:
                    check(document, media["schema"], media["example"])
                    num_examples += 1
                is_told = status != "default" and path != "/bitwatt/v1/comparison"
                assert "example" in media or not is_told or not media, (path, status)
    assert num_examples > 100
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert chat["200"]["content"]["application/json"]["example"]["model"] == "tiny"
    too_large = chat["413"]["content"]["application/json"]["example"]["error"]
    assert too_large["code"] == "request_too_large"
