"""/v1/embeddings: inputs and formats, clients' ways, limits, and who pays."""

import asyncio
import base64
import struct

import openai
import pytest
from bitwatt_client.exposition import parse_samples

from tests.fakes import FakeEngine, make_app, make_client, make_info, make_tokenizer, run_server

pytestmark = pytest.mark.anyio

ASKED = {"model": "tiny", "input": "the quick fox"}


def numbers_of(response):
    assert response.status_code == 200, response.text
    return [entry["embedding"] for entry in response.json()["data"]]


async def post(client, **changes):
    return await client.post("/v1/embeddings", json=ASKED | changes)


def num_tokens(text):
    return len(make_tokenizer().encode(text).ids)


async def test_the_openai_sdk_gets_the_same_vectors_in_both_formats():
    async with (
        run_server(make_app()) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        texts = ["the quick fox", "a", "héllo wörld 🙂"]
        ways = [
            await client.embeddings.create(model="tiny", input=texts),  # the SDK asks for base64
            await client.embeddings.create(model="tiny", input=texts, encoding_format="float"),
            await client.embeddings.create(model="tiny", input=texts, dimensions=4),
        ]
        raw = await client.embeddings.create(model="tiny", input=texts, encoding_format="base64")
    for answer in ways:
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert [entry.embedding for entry in answer.data] == [
            entry.embedding for entry in ways[1].data
        ]
        assert answer.usage.prompt_tokens == sum(map(num_tokens, texts))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens
        assert answer.model == "tiny"
    for text, entry in zip(texts, ways[1].data, strict=True):
        first = struct.unpack("f", struct.pack("f", 1 / (1 + num_tokens(text))))[0]
        assert entry.embedding[0] == first
    unpacked = [struct.unpack("<4f", base64.b64decode(entry.embedding)) for entry in raw.data]
    assert unpacked == [tuple(entry.embedding) for entry in ways[1].data]


async def test_texts_and_ids_one_and_many_come_in_their_order():
    engine = FakeEngine()
    ids = [make_tokenizer().encode(text).ids for text in ("the quick fox", "a")]
    async with make_client(make_app(engine)) as client:
        one = numbers_of(await post(client))
        assert numbers_of(await post(client, input=ids[0])) == one
        both = numbers_of(await post(client, input=["the quick fox", "a"]))
        assert numbers_of(await post(client, input=ids)) == both
        assert numbers_of(await post(client, input=["a", ids[0]])) == both[::-1]
    assert both[0] == one[0] != both[1]
    assert all(s.sampling.embeds and s.sampling.max_tokens == 0 for s in engine.submitted)


async def test_a_request_of_many_inputs_leaves_the_queue_to_others():
    most = 0

    async def sleep(_):
        nonlocal most
        most = max(most, len(engine.running))
        await asyncio.sleep(0)

    engine = FakeEngine(sleep=sleep, max_open=20)
    async with make_client(make_app(engine)) as client:
        vectors = numbers_of(await post(client, input=[[5] * (1 + i % 50) for i in range(2048)]))
    assert [round(1 / vector[0]) - 2 for vector in vectors] == [i % 50 for i in range(2048)]
    assert most == make_info().max_num_seqs


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": None}, "input", "string"),
        ({"input": []}, "input", "no tokens"),
        ({"input": ""}, "input", "no tokens"),
        ({"input": ["a", ""]}, "input[1]", "no tokens"),
        ({"input": [["a"]]}, "input", "string"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": [5000]}, "input", "5000"),
        ({"input": [-1]}, "input", "below 0"),
        ({"input": [5] * 257}, "input", "--max-model-len"),
        ({"input": "a " * 5000}, "input", "--max-model-len"),
        ({"dimensions": 3}, "dimensions", "4"),
        ({"dimensions": 0}, "dimensions", "1"),
        ({"encoding_format": "bytes"}, "encoding_format", "base64"),
        ({"priority": 1}, "priority", "--allow-priority"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"messages": []}, "messages", "not supported"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_name(change, param, words):
    async with make_client(make_app()) as client:
        response = await post(client, **change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("priority", [2**31, -(2**31), 10**30])
async def test_a_priority_beyond_its_bounds_is_refused_where_callers_give_one(priority):
    # It was a 500: no message to the engine holds so large a number.
    async with make_client(make_app(allow_priority=True)) as client:
        response = await post(client, priority=priority)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"
    assert "from -2147483647 to 2147483647" in response.json()["error"]["message"]


async def test_an_input_may_fill_the_context():
    async with make_client(make_app()) as client:
        assert len(numbers_of(await post(client, input=[5] * 256))) == 1


async def test_a_key_pays_for_what_it_embeds():
    app = make_app(api_key="a,b", tokens_per_minute_per_key=10)
    async with make_client(app) as client:

        async def post_by(key, count):
            return await client.post(
                "/v1/embeddings",
                json=ASKED | {"input": [[5]] * count},
                headers={"authorization": f"Bearer {key}"},
            )

        assert (await post_by("a", 30)).status_code == 200
        refused = await post_by("a", 1)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 60  # it owes 20 of 10 a minute
        assert (await post_by("b", 1)).status_code == 200


async def test_the_cache_of_a_key_and_a_salt_is_their_own():
    engine = FakeEngine()
    app = make_app(engine, api_key="a", cache_per_key=True)
    async with make_client(app, headers={"authorization": "Bearer a"}) as client:
        await post(client, cache_salt="mine")
    [submit] = engine.submitted
    assert submit.cache_salt.endswith("mine")
    assert len(submit.cache_salt) > len("mine")


async def test_energy_is_told_in_the_forms_that_are_asked_for_and_with_a_reason_where_it_is_not():
    async with make_client(make_app(), headers={"X-Bitwatt-Energy": "1"}) as client:
        response = await post(client, input=["a"] * 9)
    body = response.json()
    assert body["energy"]["energy_joules"] is body["cost"]["request_cost_usd"] is None
    assert body["energy"]["reason"]
    assert body["usage"]["bitwatt"]["reason"]
    assert response.headers["x-energy-method"] == "unavailable"


@pytest.mark.parametrize(
    ("engine", "status"),
    [
        (FakeEngine(is_ready=False), 503),
        (FakeEngine(max_open=0), 503),
        (FakeEngine(dies_after=0), 500),
    ],
)
async def test_an_engine_that_fails_fails_the_request_and_nothing_stays_open(engine, status):
    async with make_client(make_app(engine)) as client:
        response = await post(client, input=["a"] * 20)
        samples = parse_samples((await client.get("/metrics")).text)
    assert response.status_code == status
    assert not engine.running
    assert samples.total("vllm:num_requests_running") == 0
