"""Tokenizers written into GGUF files cut texts as they did in their folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from bitwatt.checkpoints.gguf_writer import GgufWriter
from bitwatt.errors import CheckpointError
from bitwatt.text.codec import TextCodec
from bitwatt.text.gguf_tokenizer import read_gguf_text, write_gguf_text
from bitwatt.text.gguf_vocabulary import check_gguf_text, gguf_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.server.checkpoints.gguf_writer import write_gguf
from tests.server.text.test_gguf_tokenizer import (
    EXPRESSIONS,
    Trained,
    byte_level,
    of_transformers,
    pieces,
    random_texts,
    sentencepiece_metadata,
    trained,
)

__all__ = ["pieces", "trained"]  # fixtures


def exported(source: Path, path: Path, **changes: Any) -> Path:
    """Write the text of a folder or file into a GGUF file without tensors; return its path."""
    keys: dict[str, Any] = {"vocab_size": 600, "bos": 0, "eos": (1,)}
    with GgufWriter(path.parent) as writer:
        writer.finish(path, gguf_text(source, **(keys | changes)))
    return path


def assert_cut_alike(source: Path, written: Path) -> None:
    check_gguf_text(source, written)
    before, after = TextCodec.from_folder(source), TextCodec.from_folder(written)
    for text in [*random_texts(3), "a<|end|>b <|begin|>\n<think> ok"]:
        for add in (False, True):
            ids = before.encode(text, add_special_tokens=add)
            assert after.encode(text, add_special_tokens=add) == ids, text
            assert after.decode(ids) == before.decode(ids)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_a_folder_of_transformers_is_cut_alike(tmp_path: Path, trained: Trained, pre: str) -> None:
    of_transformers(pre, trained).save_pretrained(tmp_path / "folder")
    written = exported(tmp_path / "folder", tmp_path / "x.gguf", bos=None, eos=())
    assert gguf_text(written, vocab_size=0, bos=None, eos=())["tokenizer.ggml.pre"] == pre
    assert_cut_alike(tmp_path / "folder", written)


@pytest.mark.parametrize("pre", EXPRESSIONS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_way_of_cutting_comes_back_through_a_folder(
    tmp_path: Path, trained: Trained, pre: str, adds_bos: bool
) -> None:
    more = {"tokenizer.ggml.add_bos_token": adds_bos, "general.sampling.temp": 0.6}
    first = tmp_path / "first.gguf"
    write_gguf(first, byte_level(trained, pre, tokenizer__chat_template="{{ x }}") | more, {})
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf_text(first, folder)
    written = exported(folder, tmp_path / "x.gguf")
    assert_cut_alike(first, written)
    files = read_gguf_text(written)
    assert files.templates == {"default": "{{ x }}"}
    assert files.sampling_defaults == {"temperature": 0.6}
    assert files.special_tokens["pad_token"] == "<|pad|>"


def test_sentencepieces_merges_come_back_by_their_scores(tmp_path: Path, pieces: Any) -> None:
    first, folder = tmp_path / "first.gguf", tmp_path / "folder"
    write_gguf(first, sentencepiece_metadata(pieces), {})
    folder.mkdir()
    write_gguf_text(first, folder)
    written = exported(folder, tmp_path / "x.gguf", vocab_size=2000, bos=1, eos=(2,))
    assert_cut_alike(first, written)
    assert_cut_alike(written, exported(written, tmp_path / "again.gguf"))


@pytest.mark.parametrize("what", ["splitting", "normalizer", "kind", "size"])
def test_a_tokenizer_that_no_file_can_say_is_refused(tmp_path: Path, what: str) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=what == "splitting")
    tokenizer.decoder = decoders.ByteLevel()
    state = json.loads(tokenizer.to_str())
    if what == "normalizer":
        state["normalizer"] = {"type": "Lowercase"}
    if what == "kind":
        state["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    said = {
        "splitting": "its pre-tokenizer is none that a GGUF file names; llama-bpe",
        "normalizer": "its pre-tokenizer is none that a GGUF file names",
        "kind": "no GGUF file is written of a tokenizer of WordLevel",
        "size": "the tokenizer has token 2, and the model 2 rows",
    }[what]
    with pytest.raises(CheckpointError, match=said):
        exported(tmp_path, tmp_path / "x.gguf", vocab_size=2 if what == "size" else 3, bos=None)


def test_a_tokenizer_that_cuts_otherwise_is_found_out(tmp_path: Path, trained: Trained) -> None:
    for name, pre in (("one", "smollm"), ("other", "llama-bpe")):
        write_gguf(tmp_path / f"{name}.gguf", byte_level(trained, pre), {})
    with pytest.raises(CheckpointError, match="no GGUF file can say its tokenizer, which splits"):
        check_gguf_text(tmp_path / "one.gguf", tmp_path / "other.gguf")
