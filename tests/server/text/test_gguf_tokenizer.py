"""The text side of GGUF files, against transformers, SentencePiece and llama.cpp's expressions."""

import io
import json
import logging
import string
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import pytest
import regex
from bitwatt.errors import CheckpointError
from bitwatt.text.codec import TextCodec
from bitwatt.text.gguf_tokenizer import read_gguf_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.server.checkpoints.gguf_writer import Raw, write_gguf

Trained = tuple[dict[str, int], list[tuple[str, str]]]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CORPUS = [
    "The quick brown fox jumps over the lazy dog's 12345 tails, isn't it?",
    "def main():\n    print('hello, world')\n\n\treturn 3.14159 + 2**10",
    "Größenwahn, naïveté, Ελληνικά, русский текст, 日本語のテキスト, ٣٤٥ ½ ²",
    "  spaces   and\ttabs \r\n and lines\n\n\n  end  ",
    "I'LL THEY'VE we're 'tis ``code`` $5 = <a+b> ^~| 100% __init__ 🙂🙂",
] * 3

# As llama.cpp has them, each applied to what the ones before it have left.
WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    "llama-bpe": [WORDS.replace("NUMBERS", r"\p{N}{1,3}")],
    "qwen2": [WORDS.replace("NUMBERS", r"\p{N}")],
    "smollm": [
        r"\p{N}",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    ],
    "gpt-2": [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    ],
    "default": [
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_texts(seed: int, count: int = 200) -> list[str]:
    """Return texts of pieces that splitting turns on."""
    random = Random(seed)
    parts = [*string.ascii_letters, *string.digits, *string.punctuation, *" \t\n\r  \u00a0\u3000"]
    parts += [
        "'s",
        "'LL",
        "hello",
        " the",
        "ß",
        "é",
        "日本",
        "٣",
        "½",
        "🙂",
        "\r\n",
        "123",
        "▁",
        "A",
    ]
    made = ["".join(random.choices(parts, k=random.randint(0, 30))) for _ in range(count)]
    return [*CORPUS[:5], *made]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Return the vocabulary and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def int32s(values: list[int]) -> list[Raw]:
    return [Raw(5, value.to_bytes(4, "little", signed=True)) for value in values]


def byte_level(trained: Trained, pre: str | None, **changes: Any) -> dict[str, Any]:
    """Return a file's metadata; None among the changes leaves a key out."""
    vocab, merges = trained
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [
        CONTROL if token in {"<|begin|>", "<|end|>", "<|pad|>"} else NORMAL for token in tokens
    ]
    given = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<think>", "[PAD]"],
        "tokenizer.ggml.token_type": int32s([*types, USER_DEFINED, UNUSED]),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in given.items() if value is not None}


def codec_of(tmp_path: Path, metadata: dict[str, Any]) -> TextCodec:
    write_gguf(tmp_path / "x.gguf", metadata, {})
    return TextCodec.from_folder(tmp_path / "x.gguf")


def of_transformers(pre: str, trained: Trained) -> Any:
    """Return the tokenizer that the models of a pre-tokenizer have on Hugging Face."""
    import transformers

    vocab, merges = trained
    if pre == "qwen2":
        end = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|end|>")
        made = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, **end)
    else:
        inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
        steps = (
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            if pre == "llama-bpe"
            else [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
        inner.decoder = decoders.ByteLevel()
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|end|>", "<|pad|>"]})
    made.add_tokens(["<think>"])
    return made


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_byte_level_tokens_are_those_of_transformers(
    tmp_path: Path, trained: Trained, pre: str
) -> None:
    codec = codec_of(tmp_path, byte_level(trained, pre))
    theirs = of_transformers(pre, trained)
    for text in [*random_texts(1), "a<|end|>b <|begin|>\n<think> ok", "e\u0301 A\u030a"]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert codec.encode(text, add_special_tokens=False) == expected, text
        decoded = b"".join(map(codec.vocabulary.literal, expected)).decode()
        assert decoded == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_texts_are_split_by_the_expressions_of_the_pre_tokenizer(
    tmp_path: Path, trained: Trained, pre: str
) -> None:
    write_gguf(tmp_path / "x.gguf", byte_level(trained, pre), {})
    tokenizer = read_gguf_text(tmp_path / "x.gguf").tokenizer
    for text in random_texts(2):
        pieces = [text] if text else []
        for expression in EXPRESSIONS[pre]:
            pieces = [part for piece in pieces for part in cut(expression, piece)]
        split = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in split] == pieces, text


def cut(expression: str, text: str) -> list[str]:
    """Return the expression's matches and what is between them, in order."""
    parts, done = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[done : match.start()], match.group()]
        done = match.end()
    return [part for part in [*parts, text[done:]] if part]


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Return a small SentencePiece model, trained as LLaMA's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(pieces: Any, **changes: Any) -> dict[str, Any]:
    def kind(i: int) -> int:
        if pieces.is_unknown(i):
            return UNKNOWN
        if pieces.is_control(i):
            return CONTROL
        if pieces.is_byte(i):
            return BYTE
        return USER_DEFINED if pieces.id_to_piece(i) == "<think>" else NORMAL

    ids = range(len(pieces))
    given = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(pieces.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": int32s([kind(i) for i in ids]),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in given.items() if value is not None}


def test_tokens_by_score_are_those_of_sentencepiece(tmp_path: Path, pieces: Any) -> None:
    codec = codec_of(tmp_path, sentencepiece_metadata(pieces))
    for text in random_texts(3):
        expected = pieces.encode(text)
        assert codec.encode(text, add_special_tokens=False) == expected, text
        assert codec.encode(text) == [1, *expected]


def test_a_vocabulary_without_a_first_space_encodes_none(tmp_path: Path, pieces: Any) -> None:
    metadata = sentencepiece_metadata(pieces, tokenizer__ggml__add_space_prefix=False)
    codec = codec_of(tmp_path, metadata)
    assert not codec.vocabulary.strips_space
    text = "the lazy dog"
    ids = codec.encode(text, add_special_tokens=False)
    assert "".join(pieces.id_to_piece(i) for i in ids) == text.replace(" ", "▁")


def test_what_begins_and_ends_a_text_is_what_the_file_says(
    tmp_path: Path, trained: Trained, pieces: Any
) -> None:
    def around(metadata: dict[str, Any]) -> tuple[int, int]:
        ids = codec_of(tmp_path, metadata).encode("quick brown fox")
        return ids[0], ids[-1]

    inner = around(byte_level(trained, "qwen2"))
    assert not {0, 1} & set(inner)
    assert around(byte_level(trained, "llama-bpe"))[0] == 0
    told = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    assert around(byte_level(trained, "smollm", **told)) == (0, 1)
    told = {"tokenizer__ggml__add_bos_token": False}
    assert around(byte_level(trained, "llama-bpe", **told))[0] != 0
    without = {"tokenizer__ggml__bos_token_id": None}
    assert around(byte_level(trained, "llama-bpe", **without))[0] != 0
    assert around(sentencepiece_metadata(pieces, **without))[0] == 1
    assert around(sentencepiece_metadata(pieces, **told))[0] != 1


def test_templates_special_tokens_and_sampling_are_the_files(
    tmp_path: Path, trained: Trained
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    metadata = byte_level(trained, "llama-bpe") | {
        "tokenizer.chat_template": template,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": Raw(5, (20).to_bytes(4, "little")),
    }
    write_gguf(tmp_path / "x.gguf", metadata, {})
    files = read_gguf_text(tmp_path / "x.gguf")
    assert files.templates == {"default": template, "tool_use": "{{ tools }}"}
    assert files.special_tokens == {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
    }
    assert files.sampling_defaults == {"temperature": 0.5, "top_k": 20}
    codec = TextCodec.from_folder(tmp_path / "x.gguf")
    ids = codec.encode_chat([{"role": "user", "content": "fox <|end|>"}])
    assert ids[0] == 0
    assert ids.count(1) == 1  # the caller's is letters
    assert ids[-1] == 1


def test_a_token_that_is_not_used_has_no_text(tmp_path: Path, trained: Trained, capfd: Any) -> None:
    metadata = byte_level(trained, "qwen2")
    metadata["tokenizer.ggml.tokens"] += ["<last>", "the"]
    metadata["tokenizer.ggml.token_type"] += int32s([CONTROL, NORMAL])
    codec = codec_of(tmp_path, metadata)
    vocabulary = codec.vocabulary
    unused = len(trained[0]) + 1
    assert vocabulary.literal(unused) == b""
    assert vocabulary.literal(unused + 1) == b"<last>"
    assert len(vocabulary) == unused + 2  # "the" is there before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("begin", "told"), [("<|begin_of_text|>", "llama-bpe"), ("<|begin|>", "default")]
)
def test_a_file_that_names_no_pre_tokenizer_is_logged(
    tmp_path: Path,
    trained: Trained,
    begin: str,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocab, merges = trained
    renamed = {begin if token == "<|begin|>" else token: i for token, i in vocab.items()}
    with caplog.at_level(logging.WARNING):
        codec = codec_of(tmp_path, byte_level((renamed, merges), None))
    assert "key 'tokenizer.ggml.pre' is missing; texts are split as " + told in caplog.text
    named = codec_of(tmp_path, byte_level((renamed, merges), told))
    for text in random_texts(4, 20):
        assert codec.encode(text) == named.encode(text)


REFUSALS = {
    "no tokenizer": ({"tokens": None}, "key 'tokenizer.ggml.tokens' is missing"),
    "no tokens": ({"tokens": []}, "key 'tokenizer.ggml.tokens' is an array of 0 int"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "expected an array of str"),
    "another kind": ({"model": "bert"}, "'tokenizer.ggml.model' is 'bert'; gpt2 and llama are"),
    "no kind": ({"model": None}, "key 'tokenizer.ggml.model' is missing"),
    "another pre-tokenizer": (
        {"pre": "tekken"},
        "key 'tokenizer.ggml.pre' is 'tekken'; llama-bpe, llama3, llama-v3, falcon3, qwen2, gpt-",
    ),
    "no merges": ({"merges": None}, "key 'tokenizer.ggml.merges' is missing"),
    "merges of one text": ({"merges": ["ab"]}, "'tokenizer.ggml.merges' has 'ab'; expected two"),
    "merges of what is no token": ({"merges": ["qq zz"]}, "the tokenizer can't be made: "),
    "few types": ({"token_type": [1, 2]}, "key 'tokenizer.ggml.token_type' has 2 values; the voc"),
    "a bos beyond": ({"bos_token_id": 10**6}, "'tokenizer.ggml.bos_token_id' is 1000000; the voc"),
    "a bos of text": ({"bos_token_id": "<s>"}, "key 'tokenizer.ggml.bos_token_id' is '<s>'; exp"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_vocabulary_that_can_not_be_used_is_refused_by_its_key(
    tmp_path: Path, trained: Trained, what: str
) -> None:
    changes, reason = REFUSALS[what]
    given = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError) as caught:
        codec_of(tmp_path, byte_level(trained, "qwen2", **given))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.gguf'}: ")
    assert reason in message
    assert "\n" not in message


def test_a_piece_too_long_to_try_every_split_of_is_refused(tmp_path: Path, pieces: Any) -> None:
    metadata = sentencepiece_metadata(pieces)
    metadata["tokenizer.ggml.tokens"][-1] = "x" * 10_000
    with pytest.raises(CheckpointError, match="has one of 10000 characters; at most 256 are read"):
        codec_of(tmp_path, metadata)


def test_a_template_that_does_not_compile_refuses_conversations_alone(
    tmp_path: Path, trained: Trained
) -> None:
    metadata = byte_level(trained, "qwen2") | {"tokenizer.chat_template": "{% if %}"}
    codec = codec_of(tmp_path, metadata)
    assert codec.encode("quick")
    with pytest.raises(Exception, match="doesn't compile"):
        codec.encode_chat([{"role": "user", "content": "hi"}])
