from pathlib import Path

import pytest
from bitwatt.training.conversations import Conversation, Message
from bitwatt.training.data import encode_conversation
from bitwatt.training.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    EOT,
    load_tokenizer,
    save_tokenizer,
    token_id,
    train_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXTS = [
    f"def function_{i}(x):\n    return x + {i}  # User: {chr(97 + i % 26)}\n" for i in range(99)
]


TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)


@given(st.text())
def test_any_text_comes_back_unchanged(text: str):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_encoding_begins_with_bos_and_special_tokens_come_first():
    assert [token_id(TOKENIZER, token) for token in (BOS, EOS, EOT)] == [0, 1, 2]
    assert TOKENIZER.encode("x").ids[0] == 0
    assert TOKENIZER.encode("x", add_special_tokens=False).ids[0] != 0
    assert TOKENIZER.encode(f"a{EOT}b", add_special_tokens=False).ids.count(2) == 1


def test_training_twice_gives_the_same_tokenizer():
    assert TOKENIZER.to_str() == train_tokenizer(TEXTS, vocab_size=300).to_str()


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="1000 are wanted"):
        train_tokenizer(["short"], vocab_size=1000)


def test_saved_tokenizer_is_read_back_by_both_libraries(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(TOKENIZER, tmp_path)
    text = "def f(x):\n\treturn x  # naïve"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode(text).ids == TOKENIZER.encode(text).ids
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    chat = [{"role": "user", "content": " Hello "}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == f"{BOS}User: Hello{EOT}Assistant: "


def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(
        messages=messages, bos_token=BOS, add_generation_prompt=add_generation_prompt
    )


def test_a_conversation_is_trained_on_in_the_tokens_the_server_will_prompt_with():
    turns = [("system", "Be brief."), ("user", "x + 1?"), ("assistant", "2"), ("user", "And 2?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = TOKENIZER.encode(render(messages, True), add_special_tokens=False).ids
    conversation = Conversation((*(Message(*turn) for turn in turns), Message("assistant", "3")))
    document = encode_conversation(conversation, TOKENIZER)
    ids = list(document.tokens)
    assert ids[: len(prompt)] == prompt
    assert list(document.is_counted) == [index >= len(prompt) for index in range(len(ids))]
    assert TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=False) == f"3{EOT}"


def test_a_message_without_content_renders_empty():
    assert render([{"role": "assistant", "content": None}], False) == f"{BOS}Assistant: {EOT}"


def test_every_digit_is_a_token():
    tokens = TOKENIZER.encode("function_1234 + 56", add_special_tokens=False).tokens
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("123456")
