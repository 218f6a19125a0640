"""A folder's text files, as transformers reads them, and damaged ones."""

import json
import logging
import os
from collections.abc import Mapping

import pytest
from bitwatt.errors import CheckpointError, InvalidRequestError
from bitwatt.text.codec import TextCodec
from bitwatt.text.tokenizer_files import read_tokenizer_files

from tests.fakes import make_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
SPECIALS = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ image_token }}|{{ boi_token }}"
ADDED = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NEW_ID = make_tokenizer().get_vocab_size()


@pytest.fixture
def folder(tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, **files):
    """Write files by their names without ending; mappings as JSON, the others as they are."""
    for name, content in files.items():
        path = folder / (name if "." in name else f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Mapping | list) or content is None:
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


CASES = {
    "names in the configuration": {
        "tokenizer_config": {"bos_token": "<|user|>", "eos_token": "<|end|>"}
    },
    "names of new tokens": {
        "tokenizer_config": {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", **ADDED},
        }
    },
    "special_tokens_map.json": {
        "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<|end|>", **ADDED}}
    },
    "special_tokens_map.json goes before the configuration": {
        "tokenizer_config": {"bos_token": "<|user|>"},
        "special_tokens_map": {
            "bos_token": "<s>",
            "extra_special_tokens": ["<|im_start|>", {"content": "<|im_end|>", **ADDED}],
        },
    },
    "added_tokens.json": {
        "added_tokens": {"<|im_end|>": NEW_ID + 1, "<|im_start|>": NEW_ID, "<think>": NEW_ID + 2},
        "special_tokens_map": {
            "extra_special_tokens": ["<|im_start|>"],
            "eos_token": "<|im_end|>",
        },
    },
    "added_tokens_decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(NEW_ID): {"content": "<|im_start|>", "special": True, **ADDED},
                str(NEW_ID + 1): {"content": "<|im_end|>", "special": True, **ADDED},
                str(NEW_ID + 2): {"content": "<think>", "special": False, **ADDED, "lstrip": True},
            },
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "<|new|>"],
        },
        "special_tokens_map": {"bos_token": "<not heard>"},
        "added_tokens": {"<not heard>": 5},
    },
    "tokens of a model's own": {
        "tokenizer_config": {
            "image_token": "<|image|>",
            "extra_special_tokens": {"boi_token": "<|boi|>"},
            "add_bos_token": True,
            "bos_token": "<s>",
        }
    },
    "a list of extra tokens": {"tokenizer_config": {"extra_special_tokens": ["<|a|>", "<|b|>"]}},
    "null": {"tokenizer_config": {"bos_token": None, "additional_special_tokens": None}},
    "nothing": {},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_special_and_added_tokens_are_those_of_transformers(folder, case):
    files = {"tokenizer_config": {}} | CASES[case]
    files["tokenizer_config"] = {"chat_template": SPECIALS} | files["tokenizer_config"]
    write(folder, **files)
    theirs, codec = of_transformers(folder), TextCodec.from_folder(folder)
    ours = read_tokenizer_files(folder).tokenizer
    added = theirs.added_tokens_decoder
    assert {i: repr(t) for i, t in ours.get_added_tokens_decoder().items()} == {
        i: repr(t) for i, t in added.items()
    }
    text = "a <|im_start|>b<|im_end|> <think> <s>c</s><|image|><|boi|><|new|><|a|><not heard>"
    assert codec.encode(text) == theirs(text)["input_ids"]
    assert codec.encode_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, return_dict=False)


def test_older_files_name_special_tokens_as_transformers_4_wrote_them(folder):
    tokens = ["<|im_start|>", {"content": "<|im_end|>", **ADDED}]
    write(
        folder,
        special_tokens_map={"additional_special_tokens": tokens},
        added_tokens={"<|im_start|>": NEW_ID, "<|im_end|>": NEW_ID + 1},
    )
    codec = TextCodec.from_folder(folder)
    ids = codec.encode("<|im_start|>a<|im_end|>")
    assert ids == [NEW_ID, *make_tokenizer().encode("a").ids, NEW_ID + 1]
    assert codec.output().push(ids) == "a"


def test_a_token_whose_id_is_another_is_named_in_the_log(folder, caplog):
    decoder = {str(NEW_ID + 7): {"content": "<|im_start|>", "special": True, **ADDED}}
    write(folder, tokenizer_config={"added_tokens_decoder": decoder})
    with caplog.at_level(logging.WARNING):
        read_tokenizer_files(folder)
    assert f"is token {NEW_ID} of tokenizer.json and not {NEW_ID + 7}" in caplog.text


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": "a"}},
        {"tokenizer_config": {"chat_template": NAMED}},
        {"tokenizer_config": {"chat_template": NAMED[1:]}},
        {"tokenizer_config": {"chat_template": {"default": "x", "tool_use": "y"}}},
        {"tokenizer_config": {"chat_template": "a"}, "chat_template.jinja": "b"},
        {"tokenizer_config": {"chat_template": NAMED}, "chat_template.jinja": "b"},
        {"chat_template.jinja": "b", "additional_chat_templates/tool_use.jinja": "c"},
        {
            "additional_chat_templates/tool_use.jinja": "c",
            "tokenizer_config": {"chat_template": "a"},
        },
        {"additional_chat_templates/other.jinja": "c"},
        {},
    ],
)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_templates_are_found_as_transformers_finds_them(folder, files, tools):
    write(folder, **({"tokenizer_config": {}} | files))
    theirs, codec = of_transformers(folder), TextCodec.from_folder(folder)
    try:
        expected = theirs.apply_chat_template(MESSAGES, tools=tools, return_dict=False)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="chat template"):
            codec.encode_chat(MESSAGES, tools=tools)
    else:
        assert codec.encode_chat(MESSAGES, tools=tools) == expected


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_byte_order_mark_is_no_part_of_a_template(folder, name):
    write(folder, **{name: b"\xef\xbb\xbf<|user|>"})
    assert TextCodec.from_folder(folder).encode_chat(MESSAGES) == [2]


def test_a_byte_order_mark_in_a_configuration_is_passed_over(folder):
    config = json.dumps({"chat_template": "\ufeff<|user|>"})
    write(folder, **{"tokenizer_config.json": b"\xef\xbb\xbf" + config.encode()})
    assert TextCodec.from_folder(folder).encode_chat(MESSAGES) == [2]


@pytest.mark.parametrize("source", ["{% if %}", "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"])
def test_a_template_that_doesnt_compile_refuses_conversations_alone(folder, caplog, source):
    write(folder, tokenizer_config={"chat_template": source})
    with caplog.at_level(logging.WARNING):
        codec = TextCodec.from_folder(folder)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"can't be used: .*doesn't compile"):
            codec.encode_chat(MESSAGES)
    assert codec.encode("hello") == make_tokenizer().encode("hello").ids
    assert [record.message.count("doesn't compile") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer": "{"}, r"tokenizer\.json can't be read"),
        ({"tokenizer": b"\xff\xfe"}, r"tokenizer\.json can't be read"),
        ({"tokenizer": "null"}, r"tokenizer\.json can't be read"),
        ({"tokenizer_config": "nonsense"}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer_config": b"\xff"}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer_config": "[" * 100_000}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json is not a JSON object but \[\]"),
        ({"tokenizer_config": None}, r"tokenizer_config\.json is not a JSON object but None"),
        ({"tokenizer_config": {"chat_template": ["a"]}}, "config.json has a chat_template that"),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "has a chat_template that"),
        ({"tokenizer_config": {"chat_template": 5}}, "has a chat_template that"),
        ({"tokenizer_config": {"bos_token": 5}}, "has bos_token of 5"),
        ({"tokenizer_config": {"bos_token": {"content": 5}}}, "has bos_token of"),
        ({"tokenizer_config": {"bos_token": {"content": "a", "lstrip": 5}}}, "has bos_token of"),
        ({"tokenizer_config": {"bos_token": "\ud800"}}, "has a token that is no text"),
        ({"tokenizer_config": {"extra_special_tokens": 5}}, "has extra_special_tokens that"),
        ({"tokenizer_config": {"extra_special_tokens": [5]}}, "has extra_special_tokens of 5"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "has an added_tokens_decoder that"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "a"}}}, "has token id 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": 5}}}, "has added_tokens_decoder of 5"),
        ({"tokenizer_config": {"chat_control_tokens": "a"}}, "has chat_control_tokens that"),
        ({"special_tokens_map": []}, r"special_tokens_map\.json is not a JSON object"),
        ({"added_tokens": []}, r"added_tokens\.json is not a JSON object"),
        ({"added_tokens": {"a": "b"}}, r"added_tokens\.json has 'b' for 'a'"),
        ({"chat_template.jinja": b"\xff"}, r"chat_template\.jinja is not in UTF-8"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault_in_one_line(folder, files, reason):
    write(folder, **files)
    with pytest.raises(CheckpointError, match=reason) as error:
        TextCodec.from_folder(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        TextCodec.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_what_is_no_regular_file_isnt_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        TextCodec.from_folder(folder)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read whatever its mode says
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read: Permission denied"):
        TextCodec.from_folder(folder)


def test_an_id_far_beyond_the_vocabulary_takes_no_memory(folder):
    data = json.loads((folder / "tokenizer.json").read_bytes())
    data["model"]["vocab"]["far"] = 4_000_000_000
    write(folder, tokenizer=data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has \d+ tokens, one of them"):
        TextCodec.from_folder(folder)


@pytest.mark.parametrize("leads", ["nowhere", "to itself"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_a_link_to_a_file_that_is_lost_is_not_taken_for_none(folder, name, leads):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name if leads == "to itself" else "lost")
    with pytest.raises(CheckpointError, match=rf"{name} can't be read: (No such|Too many)"):
        TextCodec.from_folder(folder)


UNKNOWN_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
SLOW = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def edit_tokenizer(folder, **changes):
    data = json.loads((folder / "tokenizer.json").read_bytes())
    write(folder, tokenizer=data | changes)


def test_a_tokenizer_that_panics_on_every_text_is_refused_at_load(folder):
    edit_tokenizer(folder, post_processor=UNKNOWN_TOKEN)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be used: this model's tok"):
        TextCodec.from_folder(folder)


def test_a_text_that_a_tokenizer_panics_on_is_refused_and_the_next_one_is_not(folder):
    edit_tokenizer(folder, pre_tokenizer=SLOW)
    write(folder, **{"chat_template.jinja": "{{ messages[0].content }}"})
    codec = TextCodec.from_folder(folder)
    text = "a" * 100
    with pytest.raises(InvalidRequestError, match=r"fails on a text: Onig: .*retry-limit"):
        codec.encode(text)
    with pytest.raises(InvalidRequestError, match=r"fails on a text: Onig: .*retry-limit"):
        codec.encode_chat([{"role": "user", "content": text}])
    assert codec.decode(codec.encode("aB")) == "aB"


def test_half_of_a_character_is_refused_alike_as_a_text_and_in_a_conversation(folder):
    write(folder, **{"chat_template.jinja": "{{ messages[0].content }}"})
    codec = TextCodec.from_folder(folder)
    for encode in (codec.encode, lambda t: codec.encode_chat([{"role": "user", "content": t}])):
        with pytest.raises(InvalidRequestError, match="is not Unicode: it has a lone surrogate"):
            encode("a\ud800")


def replacements(*pairs):
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": pattern, "content": content}
            for pattern, content in pairs
        ],
    }


@pytest.mark.parametrize(
    "normalizer",
    [
        replacements(*[({"String": "f"}, "ff")] * 26),
        replacements(({"Regex": ""}, "x" * 100)),
        {"type": "Sequence", "normalizers": [replacements(*[({"String": "ab"}, "ab" * 9)] * 3)]},
        replacements(({"String": "a"}, "b" * 100))["normalizers"][0],
    ],
)
def test_a_normalizer_that_makes_much_of_little_is_refused(folder, normalizer):
    edit_tokenizer(folder, normalizer=normalizer)
    with pytest.raises(CheckpointError, match=r"json has a normalizer that makes texts up to \S+ "):
        TextCodec.from_folder(folder)


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        replacements(({"String": " "}, "▁")),
        replacements(({"String": "``"}, '"'), ({"Regex": r"\s+"}, " "), ({"Regex": " {2,}"}, "▁")),
    ],
)
def test_a_normalizer_as_models_have_it_is_taken(folder, normalizer):
    edit_tokenizer(folder, normalizer=normalizer)
    assert TextCodec.from_folder(folder).encode("hello")


@pytest.mark.parametrize(
    ("vocab_size", "notices"),
    [
        (NEW_ID, []),
        (2 * NEW_ID, []),  # padding
        (NEW_ID - 1, [f"texts with tokens from {NEW_ID - 1} on are refused"]),
        (
            2 * NEW_ID + 1,
            ["most of the model's have no text, so that the two may not belong together"],
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_noticed(folder, vocab_size, notices):
    found = TextCodec.from_folder(folder).vocabulary.notices_for(vocab_size)
    assert [notice.split(": ")[1] for notice in found] == notices


def test_the_tokenizer_is_described_as_transformers_keeps_it(folder):
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "model_max_length": 10**30,
        "scale": float("nan"),
        "vocab_file": "/home/someone/tokenizer.model",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"0": {"content": "<|end|>", "special": True, **ADDED}},
        "chat_template": "{{ messages }}",
    }
    write(folder, tokenizer_config=config)
    told = json.loads(TextCodec.from_folder(folder).description)
    assert told["tokenizer_class"] == "LlamaTokenizerFast"
    assert told["model_max_length"] == 10**30
    assert told["eos_token"] == of_transformers(folder).eos_token == "<|end|>"
    assert told["added_tokens_decoder"]["0"] == "<|end|>"
    assert told["chat_template"] == "{{ messages }}"
    assert told["scale"] is None
    assert "vocab_file" not in told


def test_a_folder_without_settings_is_described_by_its_tokens(folder):
    told = json.loads(TextCodec.from_folder(folder).description)
    assert told["chat_template"] is None
    assert told["added_tokens_decoder"]["0"] == "<|end|>"
