"""What a GGUF file says of its text: tokenizer, special tokens, chat templates, sampling.

A vocabulary of `gpt2` is byte-level BPE, split beforehand by an expression that the file names; one
of `llama` is SentencePiece's BPE, which merges what makes the token of the highest score.

Source  github.com/ggml-org/ggml, docs/gguf.md; github.com/ggml-org/llama.cpp, src/llama-vocab.cpp
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from bitwatt.checkpoints.gguf_file import Gguf, open_gguf
from bitwatt.errors import CheckpointError, shorten
from bitwatt.text.encoding import raised_as
from bitwatt.text.tokenizer_files import TokenizerFiles

__all__ = [
    "SAMPLING_KEYS",
    "SPECIAL_TOKENS",
    "SPLITTINGS",
    "merges_by_score",
    "read_gguf_text",
    "write_gguf_text",
]

logger = logging.getLogger(__name__)

T = TypeVar("T", int, float)

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # of tokenizer.ggml.token_type

SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # so the format spells it
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
SAMPLING_KEYS = {
    "temperature": ("temp", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}
_MAX_PIECE_CHARS = 256  # every place that a piece could be split at is tried; SentencePiece has 16

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """How a text is cut into what merges stay within.

    expressions   each cuts what those before it have left
    adds_bos      where the file doesn't say
    takes_whole   a piece that is a token is that one, whatever the merges would make of it
    normalizes    the text to NFC first
    """

    expressions: tuple[str, ...]
    adds_bos: bool = False
    takes_whole: bool = False
    normalizes: bool = False


_LLAMA_BPE = _Splitting(
    expressions=(_WORDS.format(numbers=r"\p{N}{1,3}"),), adds_bos=True, takes_whole=True
)
SPLITTINGS: Mapping[str, _Splitting] = {
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "qwen2": _Splitting(expressions=(_WORDS.format(numbers=r"\p{N}"),), normalizes=True),
    "gpt-2": _Splitting(expressions=(_GPT2,)),
    "smollm": _Splitting(expressions=(r"\p{N}", _GPT2)),
    "default": _Splitting(
        expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
}


def read_gguf_text(path: Path) -> TokenizerFiles:
    """Return what the file holds for text.

    Raises  CheckpointError of one line, with the file, the key and what is wrong with it
    """
    gguf = open_gguf(path)
    vocabulary = _Vocabulary(gguf)
    kinds: Mapping[str, Callable[[Gguf, _Vocabulary], Tokenizer]] = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    kind = gguf.require("tokenizer.ggml.model", str)
    if kind not in kinds:
        raise gguf.error(
            "tokenizer.ggml.model", f"is {shorten(kind)}; {' and '.join(kinds)} are supported"
        )
    with raised_as(lambda cause: CheckpointError(f"{path}: the tokenizer can't be made: {cause}")):
        tokenizer = kinds[kind](gguf, vocabulary)
        tokenizer.add_tokens(vocabulary.added)
    templates = {}
    for key in gguf.metadata:
        if key == "tokenizer.chat_template":
            templates["default"] = gguf.require(key, str)
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = gguf.require(key, str)
    sampling = {
        name: float(f"{value:.7g}") if number is float else value  # as it was before float32
        for name, (key, number) in SAMPLING_KEYS.items()
        if (value := gguf.get(f"general.sampling.{key}", number)) is not None
    }
    return TokenizerFiles(tokenizer, vocabulary.named, templates, None, sampling)


def write_gguf_text(path: Path, folder: Path) -> None:
    """Write what the file holds for text as a Hugging Face folder has it.

    Raises  CheckpointError as read_gguf_text() does
    """
    files = read_gguf_text(path)
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= files.special_tokens
    if files.templates:
        config["chat_template"] = [
            {"name": name, "template": source} for name, source in files.templates.items()
        ]
    if files.sampling_defaults:
        sampling = json.dumps(dict(files.sampling_defaults), indent=2) + "\n"
        (folder / "generation_config.json").write_text(sampling, encoding="utf-8")
    files.tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


class _Vocabulary:
    """The file's tokens.

    ids     by text; none of a token that is not used, and the first one of a text's several
    scores  by text, where there are scores
    added   tokens that are found in a text before it is split
    named   special tokens' texts by name
    """

    def __init__(self, gguf: Gguf) -> None:
        self._gguf = gguf
        tokens = gguf.array("tokenizer.ggml.tokens", str)
        if not tokens:
            raise gguf.error("tokenizer.ggml.tokens", "is missing: the file has no tokenizer")
        self._texts: list[str] = list(tokens)
        self.types: list[int] = self._of_each("token_type", int) or [1] * len(tokens)
        scores: list[float] = self._of_each("scores", float) or [0.0] * len(tokens)
        self.ids: dict[str, int] = {}
        self.scores: dict[str, float] = {}
        self.added: list[AddedToken] = []
        for token_id, (text, kind) in enumerate(zip(self._texts, self.types, strict=True)):
            if kind == _UNUSED or text in self.ids:
                continue
            self.ids[text] = token_id
            self.scores[text] = scores[token_id]
            if text and kind in {_UNKNOWN, _CONTROL, _USER_DEFINED}:
                is_special = kind != _USER_DEFINED
                self.added.append(AddedToken(text, special=is_special, normalized=False))
        special = {name: self.special_id(key) for name, key in SPECIAL_TOKENS.items()}
        self.named = {name: self._texts[at] for name, at in special.items() if at is not None}

    def special_id(self, name: str, default: int | None = None) -> int | None:
        """Return the id that the file gives a special token."""
        key = f"tokenizer.ggml.{name}_token_id"
        given = self._gguf.get(key, int)
        if given is not None and not 0 <= given < len(self._texts):
            raise self._gguf.error(key, f"is {given}; the vocabulary has {len(self._texts)} tokens")
        return default if given is None else given

    def text(self, token_id: int) -> str:
        return self._texts[token_id]

    def __len__(self) -> int:
        return len(self._texts)

    def _of_each(self, name: str, kind: type[T]) -> list[T] | None:
        key = f"tokenizer.ggml.{name}"
        array = self._gguf.array(key, kind)
        if array is None:
            return None
        if len(array) != len(self._texts):
            raise self._gguf.error(
                key, f"has {len(array)} values; the vocabulary has {len(self._texts)} tokens"
            )
        return list(array)


def _byte_level(gguf: Gguf, vocabulary: _Vocabulary) -> Tokenizer:
    key = "tokenizer.ggml.pre"
    name = gguf.get(key, str)
    if name is None:
        # The first files of BitNet b1.58 2B4T have Llama 3's vocabulary and don't say so.
        is_llama_3 = vocabulary.named.get("bos_token") == "<|begin_of_text|>"
        name = "llama-bpe" if is_llama_3 else "default"
        logger.warning("%s: key %r is missing; texts are split as %s", gguf.path, key, name)
    if name not in SPLITTINGS:
        raise gguf.error(key, f"is {shorten(name)}; {', '.join(SPLITTINGS)} are supported")
    splitting = SPLITTINGS[name]
    merges = gguf.array("tokenizer.ggml.merges", str)
    if merges is None:
        raise gguf.error("tokenizer.ggml.merges", "is missing")
    pairs = []
    for merge in merges:
        first, space, second = merge.partition(" ")
        if not (first and space and second):
            raise gguf.error("tokenizer.ggml.merges", f"has {shorten(merge)}; expected two texts")
        pairs.append((first, second))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=splitting.takes_whole)
    )
    if splitting.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in splitting.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = vocabulary.special_id("bos"), vocabulary.special_id("eos")
    _surround(tokenizer, gguf, vocabulary, bos, eos, adds_bos=splitting.adds_bos)
    return tokenizer


def _sentencepiece(gguf: Gguf, vocabulary: _Vocabulary) -> Tokenizer:
    ids, types = vocabulary.ids, vocabulary.types
    bos, eos, unknown = (
        vocabulary.special_id(name, default if default < len(vocabulary) else None)
        for name, default in (("bos", 1), ("eos", 2), ("unknown", 0))
    )
    pieces = [text for text, token_id in ids.items() if types[token_id] == 1]
    longest = max(map(len, pieces), default=0)
    if longest > _MAX_PIECE_CHARS:
        raise gguf.error(
            "tokenizer.ggml.tokens",
            f"has one of {longest} characters; at most {_MAX_PIECE_CHARS} are read",
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges_by_score(pieces, vocabulary.scores),
            unk_token=None if unknown is None else vocabulary.text(unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    ends: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if gguf.get("tokenizer.ggml.add_space_prefix", bool, True):
        marks.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(ends)
    _surround(tokenizer, gguf, vocabulary, bos, eos, adds_bos=True)
    return tokenizer


def merges_by_score(pieces: Sequence[str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make another one, those of the highest score first."""
    known = set(pieces)
    return [
        (piece[:at], piece[at:])
        for piece in sorted(pieces, key=lambda piece: -scores[piece])
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]


def _surround(
    tokenizer: Tokenizer,
    gguf: Gguf,
    vocabulary: _Vocabulary,
    bos: int | None,
    eos: int | None,
    *,
    adds_bos: bool,
) -> None:
    """Let the tokenizer add what begins and ends a text, where the file says so."""
    begins = gguf.get("tokenizer.ggml.add_bos_token", bool, adds_bos) and bos is not None
    ends = gguf.get("tokenizer.ggml.add_eos_token", bool, False) and eos is not None
    names = {"bos": bos if begins else None, "eos": eos if ends else None}
    around = {name: token_id for name, token_id in names.items() if token_id is not None}
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(["bos"] * begins + ["$A"] + ["eos"] * ends),
            pair=None,
            special_tokens=[
                {"id": name, "ids": [token_id], "tokens": [vocabulary.text(token_id)]}
                for name, token_id in around.items()
            ],
        )
