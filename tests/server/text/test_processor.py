"""Model folders, chat templates and their limits."""

import asyncio
import json
import threading
import time

import pytest
from bitwatt.errors import CheckpointError, InvalidRequestError
from bitwatt.text.chat_template import ChatTemplate
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer

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


async def test_a_template_file_and_named_templates_are_found(folder):
    write_config(folder, chat_template=[{"name": "default", "template": "a"}])
    assert await TextProcessor.from_folder(folder).encode_chat(MESSAGES) == (
        make_tokenizer().encode("a").ids
    )
    (folder / "chat_template.jinja").write_text("b")
    assert await TextProcessor.from_folder(folder).encode_chat(MESSAGES) == (
        make_tokenizer().encode("b").ids
    )


async def test_without_a_template_a_conversation_is_refused(folder):
    text = TextProcessor.from_folder(folder)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await text.encode_chat(MESSAGES)


def test_folders_that_lack_or_spoil_a_file_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        TextProcessor.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        TextProcessor.from_folder(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        TextProcessor.from_folder(tmp_path)
    write_config(tmp_path, chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="doesn't compile"):
        TextProcessor.from_folder(tmp_path)


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


def test_an_endless_template_is_given_up():
    endless = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="took more than"):
        ChatTemplate(endless, {}).render(MESSAGES, kwargs={}, time_limit_s=0.05)


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


async def test_rendering_happens_off_the_event_loop():
    text = make_text(template=CHAT_TEMPLATE)
    seen = []
    render = ChatTemplate.render

    def spy(self, *args, **kwargs):
        seen.append(threading.current_thread())
        time.sleep(0)
        return render(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatTemplate, "render", spy)
        await text.encode_chat(MESSAGES)
    assert seen != [threading.current_thread()]
