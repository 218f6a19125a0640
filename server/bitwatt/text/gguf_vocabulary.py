"""What a model's files say of its text, as the metadata of a GGUF file.

Source  github.com/ggml-org/ggml, docs/gguf.md; github.com/ggml-org/llama.cpp, src/llama-vocab.cpp
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitwatt.checkpoints.gguf_file import GgufArray, is_gguf, open_gguf
from bitwatt.checkpoints.gguf_writer import MetadataValue
from bitwatt.errors import CheckpointError, shorten
from bitwatt.text.encoding import encode
from bitwatt.text.gguf_tokenizer import (
    SAMPLING_KEYS,
    SPECIAL_TOKENS,
    SPLITTINGS,
    merges_by_score,
    read_gguf_text,
)
from bitwatt.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = ["check_gguf_text", "gguf_text"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_GPT2 = SPLITTINGS["gpt-2"].expressions
_COPIED = ("tokenizer.", "general.sampling.")
_MAX_TOLD = 60

# What tokenizers differ in: case, digits, spaces, lines, marks, other scripts, bytes.
_PROBES = (
    "The quick brown fox's 12345 tails, isn't IT? WE'LL see:\n\n\tdef main():  # 3.14159 ** 2\r\n",
    "  spaces   and\u00a0others\u3000end  ",
    "Größe, naïveté, Ελληνικά, русский, 日本語のテキスト, ٣٤٥ ½ ² é e\u0301 🙂👩‍👩‍👧",
    "$5 = <a+b> ^~| 100% __init__ ``x`` ▁ \x00\x7f",
)


def gguf_text(
    source: Path, *, vocab_size: int, bos: int | None, eos: Sequence[int]
) -> dict[str, MetadataValue]:
    """Return the keys of tokenizer, chat templates and sampling, of a folder or a GGUF file.

    vocab_size  rows of the embedding; ids without a token get one that is not used
    bos, eos    tokens that begin and end a text

    Raises  CheckpointError for what can't be read, or what no GGUF file can say
    """
    if is_gguf(source):
        return {
            key: list(value) if isinstance(value, GgufArray) else value
            for key, value in open_gguf(source).metadata.items()
            if key.startswith(_COPIED)
        }
    files = read_tokenizer_files(source)
    state = json.loads(files.tokenizer.to_str())
    keys = _vocabulary(files.tokenizer, state, vocab_size, source)
    ids = files.tokenizer.token_to_id
    special = {
        key: token_id
        for name, key in SPECIAL_TOKENS.items()
        if name in files.special_tokens
        and (token_id := ids(files.special_tokens[name])) is not None
    }
    special |= {} if bos is None else {"bos": bos}
    special |= dict(zip(("eos", "eot", "eom"), eos, strict=False))
    keys |= {f"{key}_token_id": token_id for key, token_id in special.items()}
    plain, around = (encode(files.tokenizer, "a", add_special_tokens=add) for add in (False, True))
    keys["add_bos_token"] = around[: len(around) - len(plain)][:1] == [special.get("bos")]
    keys["add_eos_token"] = len(around) > len(plain) and around[-1] == special.get("eos")
    found: dict[str, MetadataValue] = {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
    others = [name for name in files.templates if name != "default"]
    if others:
        found["tokenizer.chat_templates"] = others
    for name, template in files.templates.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    for name, value in files.sampling_defaults.items():
        key, kind = SAMPLING_KEYS[name]
        found[f"general.sampling.{key}"] = _exactly(name, value, kind, source)
    return found


def _exactly(name: str, value: float, kind: type[int] | type[float], source: Path) -> int | float:
    """Return a recommended value as kind; CheckpointError where that would be another."""
    try:
        said = kind(value)
    except (OverflowError, ValueError):  # of NaN and infinity, and of int past the floats
        said = None
    if said is None or said != value:
        raise CheckpointError(
            f"{source}: no GGUF file can say {name} of {shorten(value)}, which it has as "
            f"{kind.__name__}"
        )
    return said


def check_gguf_text(source: Path, written: Path) -> None:
    """Raise CheckpointError where a GGUF file's text isn't that of the source, by some probes."""
    before = read_gguf_text(source) if is_gguf(source) else read_tokenizer_files(source)
    after = read_gguf_text(written)
    for probe in [*_PROBES, *before.special_tokens.values(), *before.templates.values()]:
        for add in (False, True):
            ids = [encode(one.tokenizer, probe, add_special_tokens=add) for one in (before, after)]
            if ids[0] != ids[1]:
                shown = f"{probe[:_MAX_TOLD]!r}"
                raise CheckpointError(
                    f"{source}: no GGUF file can say its tokenizer, which splits {shown} otherwise"
                )
    if _told(before) != _told(after):
        raise CheckpointError(f"{source}: no GGUF file can say its tokens, templates and sampling")


def _told(files: TokenizerFiles) -> object:
    vocabulary = files.tokenizer.get_vocab(with_added_tokens=True)
    sampling = {name: round(value, 6) for name, value in files.sampling_defaults.items()}
    return vocabulary, dict(files.templates), sampling


def _vocabulary(
    tokenizer: Tokenizer, state: Mapping[str, Any], vocab_size: int, source: Path
) -> dict[str, MetadataValue]:
    model = state["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{source}: no GGUF file is written of a tokenizer of {model['type']}"
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = tokenizer.get_added_tokens_decoder()
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    if max(texts, default=0) >= vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has token {max(texts)}, and the model {vocab_size} rows"
        )
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    types = [_NORMAL if token_id in texts else _UNUSED for token_id in range(vocab_size)]
    for token_id, token in added.items():
        types[token_id] = _CONTROL if token.special else _USER_DEFINED
    if model["byte_fallback"]:
        return _sentencepiece(state, merges, tokens, types, source)
    keys: dict[str, MetadataValue] = {"model": "gpt2", "pre": _splitting(state, source)}
    return keys | {"tokens": tokens, "token_type": types, "merges": [" ".join(m) for m in merges]}


def _sentencepiece(
    state: Mapping[str, Any],
    merges: Sequence[tuple[str, ...]],
    tokens: list[str],
    types: list[int],
    source: Path,
) -> dict[str, MetadataValue]:
    """Return the keys of pieces with scores, by which the best merge makes the highest."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    for token_id, token in enumerate(tokens):
        if token == state["model"]["unk_token"]:
            types[token_id] = _UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and types[token_id] == _NORMAL:
            types[token_id] = _BYTE
    pieces = [token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL]
    by_score = merges_by_score(pieces, dict(zip(tokens, scores, strict=True)))
    if set(by_score) != set(merges):
        raise CheckpointError(f"{source}: its merges are none that SentencePiece's scores make")
    normalizer = json.dumps(state["normalizer"])
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": '"Prepend"' in normalizer,
    }


def _splitting(state: Mapping[str, Any], source: Path) -> str:
    """Return the name that a GGUF file has for how texts are cut."""
    expressions = _expressions(state["pre_tokenizer"])
    for name, splitting in SPLITTINGS.items():
        if (
            splitting.expressions == expressions
            and splitting.takes_whole == bool(state["model"]["ignore_merges"])
            and splitting.normalizes == (state["normalizer"] is not None)
        ):
            return name
    raise CheckpointError(
        f"{source}: its pre-tokenizer is none that a GGUF file names; {', '.join(SPLITTINGS)} are "
        "written"
    )


def _expressions(step: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return what a pre-tokenizer cuts by, one expression after another; None if it isn't known."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            parts = [_expressions(one) for one in steps]
            known = [part for part in parts if part is not None]
            return sum(known, ()) if len(known) == len(parts) else None
        case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}:
            return (str(cut),)
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses_regex}:
            return _GPT2 if uses_regex else ()
        case _:
            return None
