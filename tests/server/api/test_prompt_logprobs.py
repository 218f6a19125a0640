"""A prompt's log-probabilities: echo with logprobs as OpenAI has it, prompt_logprobs as vLLM."""

import json
import threading
from array import array
from dataclasses import replace

import pytest
from bitwatt.api import prompt_logprobs
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer, decoders, models

from tests.fakes import FakeEngine, make_app, make_client, make_info, make_tokenizer, untimed
from tests.server.api.test_completions import complete, with_bos_and_eos

pytestmark = pytest.mark.anyio

ECHO = {"echo": True, "logprobs": 1, "max_tokens": 0}


async def test_echo_with_logprobs_scores_the_prompt_and_draws_nothing():
    answer = await complete(FakeEngine(), prompt="the quick brown", **ECHO)
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "the quick brown",
        "logprobs": {
            "tokens": ["the", " quick", " brown"],
            "token_logprobs": [None, -0.25, -0.5],
            "top_logprobs": [
                None,
                {"<|end|>": -1.0, " quick": -0.25},
                {"<|end|>": -1.0, " brown": -0.5},
            ],
            "text_offset": [0, 3, 9],
        },
        "finish_reason": "length",
    }
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 0


async def test_what_is_drawn_follows_the_prompt():
    engine = FakeEngine()
    body = {"prompt": "the quick", "echo": True, "logprobs": 0, "max_tokens": 2}
    [choice] = (await complete(engine, **body))["choices"]
    assert choice["text"] == "the quickthe quick"
    assert choice["logprobs"]["tokens"] == ["the", " quick", "the", " quick"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][1] == {" quick": -0.25}
    assert choice["logprobs"]["text_offset"] == [0, 3, 9, 12]
    assert engine.submitted[0].sampling.prompt_logprobs == 0


async def test_a_stop_token_has_an_entry_beside_an_echo():
    """Evaluations ask for a token and leave its entry, the last one, out of a continuation's."""
    body = {"prompt": "the", "echo": True, "logprobs": 1, "max_tokens": 1}
    engine = FakeEngine(reply="")
    [choice] = (await complete(engine, **body))["choices"]
    assert choice["text"] == "the"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["the", "<|end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 3]


async def test_an_echo_without_logprobs_needs_no_token():
    answer = await complete(FakeEngine(), prompt=[40, 41], echo=True, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == make_tokenizer().decode([40, 41])
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [[7], [[7], [8, 9]], ["a b", "the"]])
async def test_each_choice_has_its_own_prompt_s_scores_of_which_each_prompt_has_one(prompt):
    engine = FakeEngine()
    answer = await complete(engine, prompt=prompt, n=3, **ECHO | {"max_tokens": 2})
    prompts = prompt if isinstance(prompt[0], list | str) else [prompt]
    for index, choice in enumerate(answer["choices"]):
        num_tokens = len(engine.submitted[index].prompt_token_ids) + 2
        entries = choice["logprobs"]
        assert choice["index"] == index
        assert all(len(column) == num_tokens for column in entries.values())
        assert [value is None for value in entries["token_logprobs"]].count(True) == 1
        assert choice == answer["choices"][index - index % 3] | {"index": index}
    assert len(answer["choices"]) == 3 * len(prompts)
    scored = [submit.sampling.prompt_logprobs for submit in engine.submitted]
    assert scored == [1, None, None] * len(prompts)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_brings_what_the_whole_answer_has(max_tokens, n):
    body = {"model": "tiny", "prompt": ["the 🙂", "a"], "n": n, **ECHO, "max_tokens": max_tokens}
    async with make_client(make_app(FakeEngine())) as client:
        whole = (await client.post("/v1/completions", json=body)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await client.post("/v1/completions", json=body | options)
    *chunks, last = [
        json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n")[:-2]
    ]
    assert untimed(last["usage"]) == untimed(whole["usage"])
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        parts = [choice["logprobs"] for choice in mine if choice["logprobs"]]
        for name, column in expected["logprobs"].items():
            assert [entry for part in parts for entry in part[name]] == column
        assert mine[-1]["finish_reason"] == expected["finish_reason"]


async def test_offsets_point_into_an_echo_though_the_tokenizer_puts_tokens_around_it():
    app = make_app(FakeEngine(), text=TextProcessor(TextCodec(with_bos_and_eos())))
    async with make_client(app) as client:
        response = await client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "the 🙂<|user|> fox", **ECHO}
        )
    [choice] = response.json()["choices"]
    assert choice["text"] == "the 🙂<|user|> fox"
    logprobs = choice["logprobs"]
    assert [logprobs["tokens"][0], logprobs["tokens"][-1]] == ["<|system|>", "<|user|>"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:-1]:
        assert "\ufffd" in token or choice["text"][offset:].startswith(token)
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] == len(choice["text"])


def bytes_alone():
    """Return a tokenizer of bytes, two of which are spelled alike: neither is a character."""
    alphabet = make_tokenizer().get_vocab()
    vocabulary = {char: i for i, char in enumerate(c for c in sorted(alphabet) if len(c) == 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


async def test_of_tokens_spelled_alike_the_likeliest_counts():
    """Else a token that isn't the likeliest would look so: its own value stood for both."""
    text = TextProcessor(TextCodec(bytes_alone()))
    alike = [i for i in range(len(text.vocabulary)) if text.vocabulary.spell(i) == "\ufffd"]
    assert len(alike) > 20

    class Alike(FakeEngine):
        def _scores(self, request):
            scores = super()._scores(request)
            return replace(scores, top_token_ids=array("i", alike[:1] * len(scores)).tobytes())

    app = make_app(Alike(info=make_info(vocab_size=len(text.vocabulary))), text=text)
    async with make_client(app) as client:
        body = {"model": "tiny", "prompt": [alike[1]] * 9, **ECHO}
        response = await client.post("/v1/completions", json=body)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][8] == -2.0
    assert logprobs["top_logprobs"][8] == {"\ufffd": -1.0}


async def test_prompt_logprobs_of_a_completion_are_vllm_s():
    answer = await complete(FakeEngine(), prompt=[5, 6, 1], prompt_logprobs=2, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "6": {"logprob": -0.25, "rank": 2, "decoded_token": make_tokenizer().decode([6])},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "<|end|>"},
            "1": {"logprob": -2.0, "rank": 2, "decoded_token": "<|system|>"},
        },
        {
            "1": {"logprob": -0.5, "rank": 2, "decoded_token": "<|system|>"},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "<|end|>"},
        },
    ]
    assert list(choice["prompt_logprobs"][1]) == ["6", "0", "1"]
    assert choice["text"] == ""
    assert choice["logprobs"] is None


async def test_prompt_logprobs_stand_beside_an_echo_each_with_its_own_number():
    body = {"prompt": [5, 6], "prompt_logprobs": 3, "logprobs": 1, "echo": True}
    engine = FakeEngine()
    [choice] = (await complete(engine, **body))["choices"]
    assert engine.submitted[0].sampling.prompt_logprobs == 3
    assert len(choice["prompt_logprobs"][1]) == 4
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2


async def test_prompt_logprobs_of_a_conversation_are_the_answer_s():
    engine = FakeEngine()
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "prompt_logprobs": 1,
        "n": 2,
        "max_completion_tokens": 0,
    }
    async with make_client(make_app(engine)) as client:
        response = await client.post("/v1/chat/completions", json=body)
        change = {"prompt_logprobs": None, "max_completion_tokens": 1}
        plain = await client.post("/v1/chat/completions", json=body | change)
    answer = response.json()
    prompt = engine.submitted[0].prompt_token_ids
    assert [list(entry or []) for entry in answer["prompt_logprobs"]] == [
        [],
        *([str(token_id), "0"] if token_id else ["0"] for token_id in prompt[1:]),
    ]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["", ""]
    assert answer["usage"]["completion_tokens"] == 0
    assert "prompt_logprobs" not in plain.json()
    assert "prompt_logprobs" not in plain.json()["choices"][0]


async def test_zero_tokens_are_for_scoring_alone():
    async with make_client(make_app()) as client:
        for change in ({}, {"logprobs": 1}, {"echo": False}, {"prompt_logprobs": None}):
            body = {"model": "tiny", "prompt": "a", "max_tokens": 0, **change}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "max_tokens"
            assert "or 0 with prompt_logprobs" in response.json()["error"]["message"]


async def test_a_prompt_may_fill_the_context_where_nothing_is_drawn():
    answer = await complete(FakeEngine(), prompt=[5] * 256, **ECHO)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 256


async def test_an_answer_that_would_be_too_large_is_refused_with_the_numbers():
    engine = FakeEngine(info=make_info(max_model_len=9000))
    body = {"model": "tiny", "prompt": [[5] * 8192] * 4, **ECHO, "logprobs": 20}
    async with make_client(make_app(engine)) as client:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert "ask for 688128 log-probabilities; the limit is 524288" in response.text
        assert (await client.post("/v1/completions", json=body | {"logprobs": 1})).is_success


async def test_long_prompts_are_put_beside_the_event_loop(monkeypatch):
    threads = []
    put = prompt_logprobs._echoed

    def watched(*given):
        threads.append(threading.current_thread())
        return put(*given)

    monkeypatch.setattr(prompt_logprobs, "_echoed", watched)
    engine = FakeEngine(info=make_info(max_model_len=5000))
    await complete(engine, prompt=[[5] * 4096, [5] * 8], **ECHO)
    long, short = threads
    assert long is not threading.main_thread()
    assert short is threading.main_thread()
