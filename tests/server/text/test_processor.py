"""Model folders, chat templates and their limits."""

import asyncio
import json
import threading

import pytest
from bitwatt.errors import InvalidRequestError
from bitwatt.text.chat_template import ChatTemplate
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer, processors

from tests.fakes import CHAT_TEMPLATE, make_text, make_tokenizer

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hello"}]


def render(source, messages=MESSAGES, **kwargs):
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render(messages, kwargs=kwargs, time_limit_s=1.0)


@pytest.fixture
def folder(tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


async def test_a_folder_gives_tokenizer_template_and_special_tokens(folder):
    write_config(
        folder,
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        bos_token={"content": "<|user|>"},
        eos_token="<|end|>",
    )
    text = TextProcessor.from_folder(folder)
    tokenizer = make_tokenizer()
    assert await text.encode_chat(MESSAGES) == [2, *tokenizer.encode("hello").ids, 0]


async def test_without_a_template_a_conversation_is_refused(folder):
    text = TextProcessor.from_folder(folder)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await text.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_reaches_out_or_refuses_is_an_invalid_request(source):
    with pytest.raises(InvalidRequestError):
        render(source)


def test_templates_may_break_loops_and_write_json():
    source = (
        "{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% break %}{% endif %}"
        "{% endfor %}{{ bos_token }}{{ strftime_now('%Y') | length }}"
    )
    assert render(source, [{"a": "é"}, {"b": 1}]) == '{"a": "é"}<s>4'


async def test_a_folder_that_asks_to_truncate_or_pad_is_not_heard(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(folder / "tokenizer.json"))
    token_ids = await TextProcessor.from_folder(folder).encode("the quick brown fox")
    assert token_ids == make_tokenizer().encode("the quick brown fox").ids


async def test_a_text_that_must_be_too_long_is_refused_unencoded():
    with pytest.raises(InvalidRequestError, match=r"at least \d+ tokens; the limit is 10") as error:
        await make_text().encode("a" * 1_000_000, max_tokens=10)
    assert error.value.code == "context_length_exceeded"


async def test_long_texts_are_encoded_beside_the_event_loop():
    text = make_text()
    encode = asyncio.create_task(text.encode("the quick brown fox " * 5000))
    ticks = 0
    while not encode.done():
        await asyncio.sleep(0)
        ticks += 1
    assert ticks > 1
    assert await text.encode("the quick brown fox " * 5000) == encode.result()


async def test_decoding_spells_special_tokens_out():
    assert await make_text().decode([2, *make_tokenizer().encode("a").ids, 0]) == "<|user|>a<|end|>"


async def test_rendering_happens_off_the_event_loop(monkeypatch):
    text = make_text(template=CHAT_TEMPLATE)
    seen = []
    render = ChatTemplate.render

    def spy(self, *args, **kwargs):
        seen.append(threading.current_thread())
        return render(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", spy)
    await text.encode_chat(MESSAGES)
    assert seen
    assert threading.current_thread() not in seen


async def test_short_work_doesnt_wait_for_long_work(monkeypatch):
    text, gate = make_text(), threading.Event()
    encode = TextCodec.encode

    def hold(self, prompt, **options):
        if len(prompt) > 100_000:
            gate.wait()
        return encode(self, prompt, **options)

    monkeypatch.setattr(TextCodec, "encode", hold)
    held = [asyncio.create_task(text.encode("fox " * 50_000)) for _ in range(5)]
    await asyncio.sleep(0)
    try:
        assert await text.encode_chat(MESSAGES)
        assert await text.encode("the quick brown fox " * 1000)
        assert await text.decode([5] * 5000) == await text.decode([5]) * 5000
        assert not any(task.done() for task in held)
    finally:
        gate.set()
    await asyncio.gather(*held)


async def test_a_conversation_that_waits_long_is_not_refused_for_it(monkeypatch):
    text, gate = make_text(), threading.Event()
    render = ChatTemplate.render

    def hold(self, *args, **kwargs):
        gate.wait()
        return render(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", hold)
    monkeypatch.setattr("bitwatt.text.codec.TEMPLATE_TIME_LIMIT_S", 0.05)
    waiting = [asyncio.create_task(text.encode_chat(MESSAGES)) for _ in range(8)]
    await asyncio.sleep(1.0)
    gate.set()
    expected = await make_text().encode_chat(MESSAGES)
    assert await asyncio.gather(*waiting) == [expected] * 8


@pytest.mark.parametrize(
    ("messages", "tools", "is_short"),
    [
        (MESSAGES, None, True),
        ([{"role": "user", "content": "a" * 70_000}], None, False),
        ([{"role": "user", "content": "a" * 700}] * 100, None, False),
        (MESSAGES, [{"function": {"description": "a" * 70_000}}], False),
        (MESSAGES, [{"function": {"a" * 70_000: 1}}], False),
        (MESSAGES, [{"function": {"enum": [""] * 70_000}}], False),
    ],
)
async def test_all_that_a_conversation_brings_makes_it_long(monkeypatch, messages, tools, is_short):
    text, names = make_text(), []
    encode_chat = TextCodec.encode_chat

    def spy(self, *args, **kwargs):
        names.append(threading.current_thread().name)
        return encode_chat(self, *args, **kwargs)

    monkeypatch.setattr(TextCodec, "encode_chat", spy)
    await text.encode_chat(messages, tools=tools)
    assert names[0].startswith("text-short" if is_short else "text-long")


def make_text_with_bos(*, also_eos=False):
    """Return a text processor whose tokenizer puts <|user|> before a text."""
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    single = "<|user|> $A <|end|>" if also_eos else "<|user|> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|user|>", 2), ("<|end|>", 0)]
    )
    return TextProcessor(TextCodec(tokenizer))


@pytest.mark.parametrize("also_eos", [True, False])
async def test_a_prompt_that_begins_with_bos_gets_no_second_one(also_eos):
    text = make_text_with_bos(also_eos=also_eos)
    fox, end = make_tokenizer().encode("fox").ids, [0] * also_eos
    assert await text.encode("fox") == [2, *fox, *end]
    assert await text.encode("<|user|>fox") == [2, *fox, *end]
    assert await text.encode("<|user|><|user|>fox") == [2, 2, *fox, *end]
    assert await text.encode("fox<|user|>") == [2, *fox, 2, *end]
    assert await text.encode("<|user|>fox", add_special_tokens=False) == [2, *fox]
    assert await text.encode("") == [2, *end]


async def test_what_the_tokenizer_puts_behind_a_text_is_no_bos():
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    assert TextCodec(tokenizer).encode("<|end|><|end|>") == [0, 0, 0]
