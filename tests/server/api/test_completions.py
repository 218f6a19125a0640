"""/v1/completions."""

import json

import openai
import pytest
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.fakes import FakeEngine, make_app, make_client, make_tokenizer, run_server, untimed

pytestmark = pytest.mark.anyio


def with_bos_and_eos():
    """Return the small tokenizer, with <|system|> before a text and <|user|> after it."""
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|user|>", special_tokens=[("<|system|>", 1), ("<|user|>", 2)]
    )
    return tokenizer


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
    assert untimed(chunks[-1].usage.model_dump()) == untimed(whole.usage.model_dump())


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


@pytest.mark.parametrize(
    ("reply", "stop"),
    [("the 🙂 你好 fox", None), ("🙃🙃", None), ("the quick brown fox", "k bro"), ("a 🙂 b", "🙂")],
)
async def test_text_offsets_point_into_the_text_streamed_or_not(reply, stop):
    """They once counted U+FFFD for each token of a character, and ran past the text."""
    app = make_app(FakeEngine(reply=reply))
    body = {"model": "tiny", "prompt": "a", "logprobs": 0, "stop": stop}
    async with make_client(app) as client:
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        stream = await client.post("/v1/completions", json=body | {"stream": True})
    text, offsets = whole["text"], whole["logprobs"]["text_offset"]
    assert len(offsets) == len(whole["logprobs"]["tokens"]) > 1
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] <= len(text)
    for token, offset in zip(whole["logprobs"]["tokens"], offsets, strict=True):
        if "\ufffd" not in token and stop is None:
            assert text[offset:].startswith(token)
    events = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n")[:-2]]
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert [i for part in streamed if part for i in part["text_offset"]] == offsets


@pytest.mark.parametrize(
    ("reply", "stop", "texts"),
    [
        ("the<|user|><|user|> fox", None, ["the", "", "", " fox"]),
        ("<|user|>🙂", "fog", ["", "🙂"]),
        # "the" may be the stop string's beginning: nothing behind it is told before that is known.
        ("the<|user|><|user|>", "the!", []),
        ("the<|user|> quick", "the!", ["the quick"]),
    ],
)
async def test_tokens_without_text_are_told_as_they_come_where_they_are_asked_for(
    reply, stop, texts
):
    """They waited for text, which an answer that goes on past its end may not have for long."""
    body = {"model": "tiny", "prompt": "a", "logprobs": 0, "stream": True, "stop": stop}
    async with make_client(make_app(FakeEngine(reply=reply))) as client:
        stream = await client.post("/v1/completions", json=body)
    events = stream.text.split("\n\n")[:-2]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in events]
    told = [choice for choice in choices if choice["finish_reason"] is None]
    assert [choice["text"] for choice in told] == texts
    assert all(choice["logprobs"]["tokens"] for choice in told)


async def test_a_null_prompt_begins_a_new_text():
    """OpenAI's default: as if from the beginning of a document, after what ended the one before."""
    engine = FakeEngine()
    answer = await complete(engine, prompt=None, echo=True)
    assert answer["choices"][0]["text"] == "the quick brown fox"
    assert answer["usage"]["prompt_tokens"] == 1
    assert engine.submitted[0].prompt_token_ids == [0]


async def test_special_tokens_are_put_around_a_prompt_unless_told_not_to_and_never_twice():
    engine = FakeEngine()
    app = make_app(engine, text=TextProcessor(TextCodec(with_bos_and_eos())))
    async with make_client(app) as client:
        for options in (
            {"prompt": "a"},
            {"prompt": "a", "add_special_tokens": None},
            {"prompt": "a", "add_special_tokens": False},
            {"prompt": "<|system|>a"},
            {"prompt": [5], "add_special_tokens": True},
            {"prompt": None},
        ):
            response = await client.post("/v1/completions", json={"model": "tiny", **options})
            assert response.status_code == 200, response.text
    [a] = make_tokenizer().encode("a").ids
    assert [submit.prompt_token_ids for submit in engine.submitted] == [
        [1, a, 2],
        [1, a, 2],
        [a],
        [1, a, 2],
        [5],
        [1, 2],
    ]


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


@pytest.mark.anyio
async def test_whole_numbers_may_be_written_with_a_point():
    # JSON has one kind of number, and so have the languages of some clients.
    body = {"model": "tiny", "prompt": [1, 2.0], "max_tokens": 4.0, "seed": 5.0, "n": 2.0}
    engine = FakeEngine()
    async with make_client(make_app(engine)) as client:
        answer = await client.post("/v1/completions", json=body)
        refused = await client.post("/v1/completions", json=body | {"max_tokens": 4.5})
        tokens = {"model": "tiny", "tokens": [10.0, 11]}
        text = await client.post("/detokenize", json=tokens)
    assert answer.status_code == text.status_code == 200
    assert [submit.prompt_token_ids for submit in engine.submitted] == [[1, 2]] * 2
    assert engine.submitted[0].sampling.max_tokens == 4
    assert refused.status_code == 400
