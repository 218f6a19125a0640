"""The embedded pair, served for real: SDK, curl, load, crashes, bad input."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from operator import mul

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.end_to_end.conftest import Server, start_server
from tests.extent import TEST_ALL

pytestmark = pytest.mark.slow

MODELS = ["builtin", "builtin-twin"]
MESSAGES: list = [{"role": "user", "content": "What does textwrap.dedent do?"}]


def make_client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def make_async_client(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_both_models_are_listed(server: Server) -> None:
    assert [model.id for model in make_client(server).models.list()] == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_sdk_gets_the_same_chat_plain_and_streamed(server: Server, model: str) -> None:
    client = make_client(server)
    plain = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=24, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert text.strip()
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == plain.usage.prompt_tokens
    assert usage.completion_tokens == plain.usage.completion_tokens
    assert plain.usage.completion_tokens <= 24


@pytest.mark.parametrize("model", MODELS)
def test_sdk_gets_the_same_completion_plain_and_streamed(server: Server, model: str) -> None:
    client = make_client(server)
    settings = {"model": model, "prompt": "def main(", "max_tokens": 16, "seed": 7}
    plain = client.completions.create(**settings)
    chunks = client.completions.create(**settings, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text


@pytest.mark.parametrize("model", MODELS)
def test_sdk_gets_embeddings_of_length_1_that_know_what_is_alike(
    server: Server, model: str
) -> None:
    client = make_client(server)
    texts = ["What does textwrap.dedent do?", "What does textwrap.dedent do", "12 + 34 ="]
    answer = client.embeddings.create(model=model, input=texts)
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")
    alone = [client.embeddings.create(model=model, input=text).data[0].embedding for text in texts]
    vectors = [entry.embedding for entry in answer.data]
    assert vectors == [entry.embedding for entry in plain.data]
    for vector in vectors:
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    if model == MODELS[0]:  # the twin's sums hang on the batch
        assert vectors == alone
    alike, other = (sum(map(mul, vectors[0], vectors[i])) for i in (1, 2))
    assert alike > other
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert answer.usage.bitwatt  # joules, or why there are none
    assert "times" not in answer.usage.bitwatt


@pytest.mark.needs_program("curl")
@pytest.mark.parametrize("model", MODELS)
def test_curl_gets_chat_and_completion_plain_and_streamed(server: Server, model: str) -> None:
    def curl(path: str, body: dict) -> str:
        command = ["curl", "-sS", "-N", f"{server.url}{path}", "-d", json.dumps(body)]
        command += ["-H", "Content-Type: application/json"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    chat = {"model": model, "messages": MESSAGES, "max_tokens": 4}
    completion = {"model": model, "prompt": "import ", "max_tokens": 4}
    assert json.loads(curl("/v1/chat/completions", chat))["choices"][0]["message"]["content"]
    assert json.loads(curl("/v1/completions", completion))["choices"][0]["text"]
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        events = curl(path, {**body, "stream": True}).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def make_load(count: int) -> list[dict]:
    words = ["import", "def", "class", "return", "self", "value", "name", "list", "open", "read"]
    return [
        {
            "prompt": " ".join(words[(i + j) % len(words)] for j in range(1 + 7 * i % 90)),
            "max_tokens": 8 + 11 * i % 60,
            "temperature": 0,
        }
        for i in range(count)
    ]


async def stream_text(client: AsyncOpenAI, model: str, settings: dict) -> str:
    stream = await client.completions.create(model=model, stream=True, **settings)
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_32_streams_at_once_get_the_text_each_gets_alone(server: Server) -> None:
    load = make_load(32)

    async def scenario() -> tuple[list[str], list[str]]:
        async with make_async_client(server) as client:
            alone = [await stream_text(client, "builtin", settings) for settings in load]
            together = await asyncio.gather(
                *(stream_text(client, "builtin", settings) for settings in load)
            )
            return alone, list(together)

    alone, together = asyncio.run(scenario())
    assert together == alone


def test_where_the_16_bit_baseline_differs_under_load_it_is_a_near_tie(server: Server) -> None:
    load = make_load(32 if TEST_ALL else 16)

    async def logprobs_of(client: AsyncOpenAI, settings: dict) -> list[tuple[str, dict]]:
        answer = await client.completions.create(model="builtin-twin", logprobs=5, **settings)
        found = answer.choices[0].logprobs
        return list(zip(found.tokens, found.top_logprobs, strict=True))

    async def scenario() -> tuple[list, list]:
        async with make_async_client(server) as client:
            alone = [await logprobs_of(client, settings) for settings in load]
            together = await asyncio.gather(*(logprobs_of(client, s) for s in load))
            return alone, list(together)

    alone, together = asyncio.run(scenario())
    num_same = 0
    for mine, theirs in zip(alone, together, strict=True):
        differing = first_difference([t for t, _ in mine], [t for t, _ in theirs])
        if differing is None:
            num_same += 1
            continue
        token, top = mine[differing]
        other = theirs[differing][0]
        # bfloat16 carries 8 bits: logits of about 10 differ by up to 0.06 when rounded otherwise.
        assert abs(top[token] - top[other]) < 0.13
    assert num_same > len(load) / 2


def first_difference(a: list[str], b: list[str]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def test_clients_dropped_mid_stream_leave_nothing_running(server: Server) -> None:
    async def drop(client: AsyncOpenAI, model: str) -> None:
        stream = await client.completions.create(
            model=model, prompt="x = ", max_tokens=900, stream=True
        )
        async for _ in stream:
            await stream.close()
            return

    async def scenario() -> None:
        async with make_async_client(server) as client:
            await asyncio.gather(*(drop(client, MODELS[i % 2]) for i in range(8)))

    asyncio.run(scenario())
    for model in MODELS:
        wait_idle(server, model)


def wait_idle(server: Server, model: str) -> None:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if all(server.metric(name, model_name=model) == 0 for name in names):
            return
        time.sleep(0.2)
    raise AssertionError({name: server.metric(name, model_name=model) for name in names})


def test_killed_engine_fails_its_streams_and_comes_back(request: pytest.FixtureRequest) -> None:
    """Both of a pair under BITWATT_TEST_ALL=1; test_soak.py kills a pair's at any rate."""
    server: Server = request.getfixturevalue("own_pair" if TEST_ALL else "own_server")
    models = MODELS if TEST_ALL else MODELS[:1]
    client = make_client(server)
    engines = server.engine_ids()
    assert len(engines) == len(models)
    # 7200 tokens a stream, and none ends it early: about a second of work, killed at its start.
    endless = {"n": 8, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    streams = [
        client.completions.create(model=model, prompt="x", stream=True, **endless)
        for model in models
    ]
    for stream in streams:
        next(iter(stream))
    for pid in engines.values():
        os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(openai.APIError):
            exhaust(stream)
    assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 503
    assert server.process.poll() is None
    server.wait_ready(30)
    for model in models:
        answer = client.completions.create(model=model, prompt="x", max_tokens=4, temperature=0)
        assert answer.choices[0].text
    assert not set(server.engine_ids()) & set(engines)


def exhaust(stream: Iterable[object]) -> None:
    for _ in stream:
        pass


BAD_BODIES: dict[str, tuple[dict | bytes, str | None, str]] = {
    "malformed JSON": (b'{"model": "builtin", ', None, "JSON"),
    "not an object": (b"[1, 2]", None, "object"),
    "wrong type": ({"prompt": "x", "max_tokens": "many"}, "max_tokens", "max_tokens"),
    "boolean for a number": ({"prompt": "x", "max_tokens": True}, "max_tokens", "max_tokens"),
    "negative number": ({"prompt": "x", "max_tokens": -1}, "max_tokens", "-1"),
    "negative temperature": ({"prompt": "x", "temperature": -0.1}, "temperature", "0"),
    "top_p past one": ({"prompt": "x", "top_p": 1.1}, "top_p", "1"),
    "n past its cap": ({"prompt": "x", "n": 100000}, "n", "n"),
    "unknown model": ({"model": "gpt-4", "prompt": "x"}, "model", "builtin"),
    "unsupported option": ({"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
    "over-long prompt": ({"prompt": "word " * 5000}, "prompt", "--max-model-len"),
    "token past the vocabulary": ({"prompt": [10**6]}, "prompt", "1000000"),
    "negative token": ({"prompt": [-1]}, None, "prompt"),
    "empty prompt": ({"prompt": []}, "prompt", "prompt"),
    "no prompt": ({}, "prompt", "prompt"),
    "10 MB body": ({"prompt": "x" * 10_000_000}, None, "2097152"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_input_gets_a_4xx_that_names_field_and_limit(server: Server, case: str) -> None:
    body, param, mention = BAD_BODIES[case]
    if isinstance(body, dict):
        body = json.dumps({"model": "builtin", **body}).encode()
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/completions"
    response = httpx.post(url, content=body, headers=headers, timeout=60)
    assert 400 <= response.status_code < 500
    assert response.status_code != 422
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert mention in error["message"]
    if param is not None:
        assert error["param"] == param
    assert len(response.content) < 2000
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(AssertionError, match=rf"port {port}: Address already in use.*--port"):
            start_server("--port", port)
