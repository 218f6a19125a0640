"""/v1/completions."""

import openai
import pytest

from tests.fakes import FakeEngine, make_app, make_client, make_tokenizer, run_server

pytestmark = pytest.mark.anyio


async def complete(engine, **body):
    async with make_client(make_app(engine)) as client:
        response = await client.post("/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_openai_client_completes_and_streams():
    app = make_app(FakeEngine())
    async with (
        run_server(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        whole = await client.completions.create(model="tiny", prompt="a")
        stream = await client.completions.create(
            model="tiny", prompt="a", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].text == "the quick brown fox"
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "the quick brown fox"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("prompt", "num_choices"),
    [("a b", 1), (["a", "b"], 2), ([40, 41], 1), ([[40], [41, 42], [43]], 3)],
)
async def test_a_prompt_is_text_or_tokens_one_or_several(prompt, num_choices):
    engine = FakeEngine()
    answer = await complete(engine, prompt=prompt)
    assert [choice["index"] for choice in answer["choices"]] == list(range(num_choices))
    given = prompt if isinstance(prompt, list) and num_choices > 1 else [prompt]
    encode = make_tokenizer().encode
    assert [submit.prompt_token_ids for submit in engine.submitted] == [
        encode(p).ids if isinstance(p, str) else p for p in given
    ]


async def test_sixteen_tokens_are_the_default():
    engine = FakeEngine()
    await complete(engine, prompt="a")
    assert engine.submitted[0].sampling.max_tokens == 16


async def test_the_default_gives_way_where_the_context_leaves_less():
    engine = FakeEngine()
    await complete(engine, prompt=[5] * 250)
    assert engine.submitted[0].sampling.max_tokens == 6


async def test_n_choices_follow_each_prompt_and_a_prompt_counts_once():
    engine = FakeEngine()
    answer = await complete(engine, prompt=["a", "b c"], n=2, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [submit.sampling.seed for submit in engine.submitted] == [5, 6, 5, 6]
    encode = make_tokenizer().encode
    assert answer["usage"]["prompt_tokens"] == len(encode("a").ids) + len(encode("b c").ids)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize("prompt", ["a b", make_tokenizer().encode("a b").ids])
async def test_echo_puts_the_prompt_before_the_text(prompt):
    answer = await complete(FakeEngine(), prompt=prompt, echo=True)
    assert answer["choices"][0]["text"] == "a bthe quick brown fox"


async def test_logprobs_hold_the_drawn_token_among_the_likely_ones():
    answer = await complete(FakeEngine(), prompt="a", logprobs=2, max_tokens=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["the", " quick"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["text_offset"] == [0, 3]
    assert logprobs["top_logprobs"][0] == {"<|end|>": -1.0, "<|system|>": -2.0, "the": -0.5}


async def test_without_logprobs_there_are_none():
    answer = await complete(FakeEngine(), prompt="a")
    assert answer["choices"][0]["logprobs"] is None


async def test_a_stop_tokens_own_text_is_left_out():
    the, quick = make_tokenizer().encode("the quick").ids
    engine = FakeEngine()
    answer = await complete(engine, prompt="a", stop_token_ids=[quick], max_tokens=1)
    assert answer["choices"][0]["text"] == "the"
    del the


async def test_tokens_that_arrive_together_go_out_together():
    app = make_app(FakeEngine(chunk_size=3))
    async with make_client(app) as client:
        response = await client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}
        )
    events = [line for line in response.text.split("\n\n") if line]
    assert len(events) == 3
    assert events[-1] == "data: [DONE]"
