"""/tokenize and /detokenize, with the options that vLLM's have."""

import pytest
from bitwatt.text.chat_template import ChatTemplate
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_info,
    make_served_app,
    make_text,
    make_tokenizer,
)

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% if enable_thinking %}think {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def with_special_tokens():
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 1), ("<|end|>", 0)]
    )
    return TextProcessor(TextCodec(tokenizer, ChatTemplate(TEMPLATE, {})))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"prompt": "a"}, "<|system|>a<|end|>"),
        ({"prompt": "a", "add_special_tokens": None}, "<|system|>a<|end|>"),
        ({"prompt": "a", "add_special_tokens": False}, "a"),
        (CHAT, "a<|assistant|>"),
        (CHAT | {"add_special_tokens": False}, "a<|assistant|>"),
        (CHAT | {"add_special_tokens": True}, "<|system|>a<|assistant|><|end|>"),
        (CHAT | {"add_generation_prompt": False, "continue_final_message": False}, "a"),
        (CHAT | {"chat_template_kwargs": {"enable_thinking": True}}, "think a<|assistant|>"),
    ],
)
async def test_a_text_and_a_conversation_are_encoded_as_asked(asked, text):
    async with make_client(make_app(text=with_special_tokens())) as client:
        response = await client.post("/tokenize", json={"model": "tiny", **asked})
        assert response.status_code == 200, response.text
        tokens = response.json()["tokens"]
        said = await client.post("/detokenize", json={"model": "tiny", "tokens": tokens})
    assert said.json()["prompt"] == text


async def test_what_would_be_another_prompt_is_refused():
    async with make_client(make_app()) as client:
        for option in ({"continue_final_message": True}, {"chat_template": "x"}):
            response = await client.post("/tokenize", json={"model": "tiny", **CHAT, **option})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == next(iter(option))


async def test_tools_are_put_as_the_template_puts_them_and_checked_beside_a_text_too():
    text = make_text(template="{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}")
    tool = {"type": "function", "function": {"name": "abc"}}
    async with make_client(make_app(text=text)) as client:
        response = await client.post("/tokenize", json={"model": "tiny", **CHAT, "tools": [tool]})
        assert response.json()["tokens"] == text.codec.encode("abc", add_special_tokens=False)
        wrong = {"model": "tiny", "prompt": "a", "tools": [{"type": "function"}]}
        response = await client.post("/tokenize", json=wrong)
    assert response.json()["error"]["param"] == "tools[0].function"


async def test_tokens_and_settings_are_the_first_model_s_where_none_is_named():
    engines = {"one": FakeEngine(), "two": FakeEngine(info=make_info(max_model_len=99))}
    async with make_client(make_served_app(engines)) as client:
        counts = [
            (await client.post("/tokenize", json={"prompt": "a"} | named)).json()["max_model_len"]
            for named in ({}, {"model": None}, {"model": "one"}, {"model": "two"})
        ]
        assert counts == [256, 256, 256, 99]
        tokens = make_tokenizer().encode("the fox").ids
        assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {
            "prompt": "the fox"
        }
        answers = [
            await client.get(f"/tokenizer_info{query}") for query in ("", "?model=two", "?model=x")
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 404]
    assert answers[0].headers["content-type"] == "application/json"
