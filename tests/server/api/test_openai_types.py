"""Every body and chunk is what OpenAI publishes: its SDK's own models, read strictly.

The SDK itself takes anything. Here a required field that is missing, a field that it doesn't know,
a value of another type and a null where OpenAI sends none are each a fault.
"""

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from bitwatt.scheduling.request import FinishReason
from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
    chat_completion_token_logprob,
)
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from tests.fakes import FakeEngine, make_app, make_client

pytestmark = pytest.mark.anyio

OURS = {
    CompletionUsage: {"bitwatt"},
    Model: {
        "max_model_len",
        "weights",
        "dtype",
        "root",
        "quantized",
        "default_sampling_params",
    },
    Completion: {"obfuscation"},  # OpenAI documents it for both; the SDK has it for chat alone
}
"""What we add, by name."""

NULLABLE = {
    CompletionChoice: {"logprobs"},
    chat_completion.Choice: {"logprobs"},
    chat_completion.ChoiceLogprobs: {"content", "refusal"},
    chat_completion_chunk.ChoiceLogprobs: {"content", "refusal"},
    ChatCompletionMessage: {"content", "refusal"},
    ChatCompletionTokenLogprob: {"bytes"},
    chat_completion_token_logprob.TopLogprob: {"bytes"},
    ChunkChoice: {"finish_reason"},
    ErrorObject: {"code", "param"},
}
"""Fields that OpenAI's document requires and lets be null; in the SDK they may be missing too."""

NULL_OR_MISSING = {
    ChunkChoice: {"logprobs"},
    ChatCompletionChunk: {"usage"},  # in all chunks but the last, where usage is asked for
}
NULL_IN_CHUNKS = {Completion: {"usage"}, CompletionChoice: {"finish_reason"}}
"""What completions' chunks, which have no model of their own, have before the last one."""


def faults(value: Any, kind: Any, *, path: str = "", is_chunk: bool = False) -> list[str]:
    """Return what keeps the value from being of the kind, each with its path."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return faults(value, args[0], path=path, is_chunk=is_chunk)
    if origin is Literal:
        return [] if value in args else [f"{path} is {value!r}, not of {args}"]
    if origin in (Union, types.UnionType):
        kinds = [one for one in args if one is not type(None)]
        found = [faults(value, one, path=path, is_chunk=is_chunk) for one in kinds]
        return min(found, key=len)
    if origin is list:
        if not isinstance(value, list):
            return [f"{path} is {value!r}, not a list"]
        return [
            fault
            for index, item in enumerate(value)
            for fault in faults(item, args[0], path=f"{path}[{index}]", is_chunk=is_chunk)
        ]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path} is {value!r}, not an object"]
        return [
            fault
            for key, item in value.items()
            for fault in faults(item, args[1], path=f"{path}[{key!r}]", is_chunk=is_chunk)
        ]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _faults_of_object(value, kind, path, is_chunk)
    is_one = type(value) is kind or (kind is float and type(value) is int)
    return [] if is_one else [f"{path} is {value!r}, not {kind}"]


def _faults_of_object(value: Any, kind: type[BaseModel], path: str, is_chunk: bool) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path} is {value!r}, not an object"]
    required = NULLABLE.get(kind, set())
    nullable = required | NULL_OR_MISSING.get(kind, set())
    if is_chunk:
        nullable = nullable | NULL_IN_CHUNKS.get(kind, set())
    fields = kind.model_fields
    found = [
        f"{path}.{name} is no field of {kind.__name__}"
        for name in value.keys() - fields.keys() - OURS.get(kind, set())
    ]
    for name, field in fields.items():
        if name not in value:
            if field.is_required() or name in required:
                found.append(f"{path}.{name} is missing")
        elif value[name] is not None:
            annotation = field.annotation
            found += faults(value[name], annotation, path=f"{path}.{name}", is_chunk=is_chunk)
        elif name not in nullable:
            found.append(f"{path}.{name} is null")
    return found


def fault_of_error(body: Any) -> list[str]:
    assert body.keys() == {"error"}
    return faults(body["error"], ErrorObject)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "tiny", "prompt": "a"}
ROUTES = {"chat/completions": (CHAT, ChatCompletion, ChatCompletionChunk)}
ROUTES["completions"] = (TEXT, Completion, Completion)

CHANGES = [
    {},
    {"n": 3, "seed": 1},
    {"max_tokens": 2},
    {"max_tokens": 1, "n": 2},
    {"stop": "brown"},
    {"stop": ["the"]},
    {"stop": ["fox", "row"], "n": 2},
    {"stop_token_ids": [5]},
    {"ignore_eos": True, "max_tokens": 40},
    {"logit_bias": {"5": -100}, "top_k": 3},
]
LOGPROBS = {
    "chat/completions": [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 0},
        {"logprobs": True, "top_logprobs": 3},
    ],
    "completions": [
        {"logprobs": 0},
        {"logprobs": 2},
        {"echo": True},
        {"prompt": ["a", "b"], "n": 2},
        {"prompt": [[5, 6], [7]]},
        {"prompt": None},
    ],
}
STREAMS = [
    {},
    {"include_usage": False},
    {"include_usage": True},
    {"include_usage": True, "continuous_usage_stats": True},
    {"include_usage": True, "include_obfuscation": True},
]


def bodies(path: str) -> list[dict[str, Any]]:
    """Return what is asked on the route: each change with each kind of logprobs, or none."""
    changes = [
        first | second
        for first in CHANGES
        for second in ({}, *LOGPROBS[path])
        if not ("n" in first and "n" in second)
    ]
    return [ROUTES[path][0] | change for change in changes]


def make_engine() -> FakeEngine:
    return FakeEngine(replies=["the quick brown fox", "a 🙂 jumps", "<added>"], chunk_size=2)


def events_of(response: Any) -> list[Any]:
    """Return the stream's events, having checked its lines, the last one without [DONE]."""
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


@pytest.mark.parametrize("path", ROUTES)
async def test_every_answer_is_one_of_openais(path):
    kind = ROUTES[path][1]
    async with make_client(make_app(make_engine())) as client:
        for asked in bodies(path):
            response = await client.post(f"/v1/{path}", json=asked)
            assert response.status_code == 200, response.text
            assert faults(response.json(), kind) == [], asked


@pytest.mark.parametrize("path", ROUTES)
async def test_an_answer_without_text_is_one_of_openais(path):
    asked, kind, chunk_kind = ROUTES[path]
    async with make_client(make_app(FakeEngine(reply=""))) as client:
        whole = await client.post(f"/v1/{path}", json=asked | LOGPROBS[path][0])
        stream = await client.post(f"/v1/{path}", json=asked | {"stream": True})
    assert faults(whole.json(), kind) == []
    *events, done = events_of(stream)
    assert done == "[DONE]"
    for event in events:
        assert faults(json.loads(event), chunk_kind, is_chunk=True) == []


@pytest.mark.parametrize("options", STREAMS, ids=str)
@pytest.mark.parametrize("path", ROUTES)
async def test_every_chunk_is_one_of_openais_and_has_what_its_clients_gather(path, options):
    """What the Node SDK gathers: a role first, an end last, and nothing of a choice behind it."""
    kind = ROUTES[path][2]
    async with make_client(make_app(make_engine())) as client:
        for asked in bodies(path):
            body = asked | {"stream": True} | ({"stream_options": options} if options else {})
            response = await client.post(f"/v1/{path}", json=body)
            *events, done = events_of(response)
            assert done == "[DONE]"
            chunks = [json.loads(event) for event in events]
            for chunk in chunks:
                assert faults(chunk, kind, is_chunk=True) == [], body
            assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
            check_usage(chunks, options)
            for index in range(len({c["index"] for chunk in chunks for c in chunk["choices"]})):
                mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                *before, last = [choice["finish_reason"] for choice in mine]
                assert set(before) <= {None}
                assert last in ("stop", "length")
                if path == "chat/completions":
                    roles = [choice["delta"].get("role") for choice in mine]
                    assert roles == ["assistant"] + [None] * (len(mine) - 1)
                    assert mine[0]["delta"]["content"] == ""


def check_usage(chunks: list[Any], options: dict[str, bool]) -> None:
    """Check that usage comes last, alone, and only where it is asked for."""
    if not options.get("include_usage"):
        assert all("usage" not in chunk for chunk in chunks)
        return
    *before, last = chunks
    assert (last["choices"], faults(last["usage"], CompletionUsage)) == ([], [])
    assert all(len(chunk["choices"]) == 1 for chunk in before)
    is_continuous = bool(options.get("continuous_usage_stats"))
    assert all((chunk["usage"] is not None) is is_continuous for chunk in before)


async def test_models_are_openais():
    async with make_client(make_app()) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/tiny")).json()
    assert listed == {"object": "list", "data": [one]}
    assert faults(one, Model) == []


@pytest.mark.parametrize(
    ("engine", "status"),
    [
        (FakeEngine(ends_with=FinishReason.ERROR, error="out of blocks"), 500),
        (FakeEngine(dies_after=0), 500),
        (FakeEngine(is_ready=False), 503),
        (FakeEngine(max_open=0), 503),
        (FakeEngine(delay_s=9), 504),
    ],
)
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_is_openais(engine, status, path, stream):
    app = make_app(engine, request_timeout=0.05)
    async with make_client(app) as client:
        response = await client.post(f"/v1/{path}", json=ROUTES[path][0] | {"stream": stream})
    if response.status_code == 200:
        *_, event = events_of(response)
        assert fault_of_error(json.loads(event)) == []
    else:
        assert response.status_code == status
        assert fault_of_error(response.json()) == []


@pytest.mark.parametrize("path", ROUTES)
async def test_an_error_in_mid_stream_is_openais(path):
    async with make_client(make_app(FakeEngine(dies_after=2))) as client:
        response = await client.post(f"/v1/{path}", json=ROUTES[path][0] | {"stream": True})
    *chunks, error = map(json.loads, events_of(response))
    assert len(chunks) >= 2
    assert [faults(chunk, ROUTES[path][2], is_chunk=True) for chunk in chunks] == [[]] * len(chunks)
    assert fault_of_error(error) == []


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/completions", b"{", {}, 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": []}', {}, 400),
        ("POST", "/v1/completions", b'{"model": "x", "prompt": ""}', {}, 404),
        ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": 1}', {}, 400),
        ("POST", "/v1/completions", b"{}", {"authorization": "Bearer x"}, 401),
        ("POST", "/v1/completions", b" " * 4096, {}, 413),
        ("POST", "/v1/completions", b"{}", {"content-type": "text/plain"}, 415),
        ("POST", "/v1/completions", b"{}", {"host": "evil.example"}, 421),
        ("GET", "/v1/models/x", b"", {}, 404),
        ("GET", "/nowhere", b"", {}, 404),
        ("PUT", "/v1/models", b"", {}, 405),
    ],
)
async def test_a_refusal_is_openais(method, path, body, headers, status):
    given = {"authorization": "Bearer k", "content-type": "application/json"} | headers
    async with make_client(make_app(api_key="k", max_body_bytes=2048)) as client:
        response = await client.request(method, path, content=body, headers=given)
    assert response.status_code == status
    assert fault_of_error(response.json()) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda body: body.pop("id"), ".id is missing"),
        (lambda body: body.update(id=1), ".id is 1, not <class 'str'>"),
        (lambda body: body.update(colour=1), ".colour is no field of ChatCompletion"),
        (lambda body: body.update(usage=None), ".usage is null"),
        (lambda body: body["choices"][0].pop("logprobs"), ".choices[0].logprobs is missing"),
        (
            lambda body: body["choices"][0].update(finish_reason=None),
            ".choices[0].finish_reason is null",
        ),
        (
            lambda body: body["usage"].update(total_tokens=True),
            ".usage.total_tokens is True, not <class 'int'>",
        ),
    ],
)
async def test_the_check_finds_what_is_not_openais(change, fault):
    async with make_client(make_app()) as client:
        body = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert faults(body, ChatCompletion) == []
    change(body)
    assert faults(body, ChatCompletion) == [fault]
