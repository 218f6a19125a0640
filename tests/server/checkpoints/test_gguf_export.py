"""Exported GGUF files hold what the source holds, and others read them."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitwatt import builtin
from bitwatt.checkpoints.conversion import convert, convert_to_gguf
from bitwatt.checkpoints.gguf_export import GgufTarget, Written
from bitwatt.checkpoints.gguf_file import open_gguf
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.cli import main
from bitwatt.errors import CheckpointError
from bitwatt.text.gguf_tokenizer import read_gguf_text, write_gguf_text
from bitwatt.text.gguf_vocabulary import check_gguf_text, gguf_text
from bitwatt.text.tokenizer_files import read_tokenizer_files
from bitwatt_kernels.packing import TernaryWeight, times_scales, unpack
from safetensors.torch import load_file, save_file

from tests.server.checkpoints.against_transformers import load, logits_of
from tests.server.checkpoints.test_conversion import LLAMA3, linears
from tests.server.checkpoints.test_exact import made_ternary
from tests.server.checkpoints.writers import edit_config, write_dense, write_packed

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 4200,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TARGETS: list[GgufTarget] = ["gguf-tq2_0", "gguf-q2_0"]
VOCABULARY = ["model.embed_tokens.weight", "lm_head.weight"]
KINDS = ["llama", "llama3", "qwen2", "qwen3", "yarn", "tied", "relu2"]


def write(folder: Path, kind: str, rule: str = "row", embedding: str | None = None) -> None:
    """Write a ternary model whose scales float16 holds, with the embedded model's tokenizer.

    embedding  the rule of embedding and head, where these are ternary too
    """
    more: dict[str, Any] = {"llama3": {"rope_parameters": LLAMA3}}.get(kind, {})
    if kind == "yarn":
        more = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
        more["rope_parameters"]["original_max_position_embeddings"] = 64
    if kind == "tied":
        more = {"tie_word_embeddings": True}
    if kind == "qwen3":
        more = {"head_dim": 64}
    if kind == "relu2":
        write_packed(folder, "bitnet", linear_class="autobitlinear", **SIZES)
    else:
        write_dense(folder, kind if kind.startswith("qwen") else "llama", **SIZES, **more)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = tensor.half().float()
        elif name.endswith("_proj.weight") and kind != "relu2":
            tensors[name] = made_ternary(tensor, rule, torch.float16)
        elif embedding is not None and name in VOCABULARY:
            tensors[name] = made_ternary(tensor, embedding, torch.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(builtin.TERNARY / name, folder / name)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give the folder that write makes of its arguments, to be read alone."""

    @cache
    def folder(*arguments: str) -> Path:
        path = tmp_path_factory.mktemp("source") / "source"
        write(path, *arguments)
        return path

    return folder


def export(source: Path, destination: Path, target: GgufTarget, **options: Any) -> Written:
    return convert_to_gguf(
        source,
        destination,
        target,
        texts=partial(gguf_text, source),
        check_texts=partial(check_gguf_text, source),
        **options,
    )


def assert_same(source: Path, written: Path) -> None:
    """Compare each linear's codes and scales, and what the models compute of all the rest."""
    before, after = linears(source), linears(written)
    assert before.keys() == after.keys()
    for name, pair in before.items():
        for one, other in zip(pair, after[name], strict=True):
            assert torch.equal(one, other), name
    assert torch.equal(logits_of(load(source, "ternary")), logits_of(load(written, "ternary")))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_back_bit_for_bit(tmp_path, written_once, kind, target):
    source, written = written_once(kind), tmp_path / "x.gguf"
    assert export(source, written, target).notices == []
    if kind not in ("llama3", "yarn"):  # whose frequencies are written in float32
        assert_same(source, written)
    else:
        logits = [logits_of(load(path, "dense")) for path in (source, written)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("rule", ["128 weights", "64 weights"])
def test_groups_come_back_bit_for_bit(tmp_path, rule):
    write(tmp_path / "source", "qwen3", rule)
    export(tmp_path / "source", tmp_path / "x.gguf", "gguf-q2_0")
    before, after = linears(tmp_path / "source"), linears(tmp_path / "x.gguf")
    for name, (codes, scales) in before.items():
        one, other = TernaryWeight(codes, scales), TernaryWeight(*after[name])
        values = [times_scales(unpack(w.codes).float(), w.scales) for w in (one, other)]
        assert torch.equal(*values), name
    with pytest.raises(CheckpointError, match="TQ2_0 one to 256 \\(--to gguf-q2_0 has one to 64"):
        export(tmp_path / "source", tmp_path / "y.gguf", "gguf-tq2_0")


def vocabulary(path: Path) -> list[torch.Tensor]:
    """Return embedding and head as floats; the embedding twice where they are tied."""
    checkpoint = open_checkpoint(path)
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    names = VOCABULARY[:1] * 2 if checkpoint.config.is_tied else VOCABULARY
    return [checkpoint.dense(name, *shape, fits=torch.float32).float() for name in names]


def stored_as(path: Path) -> set[str]:
    """Return the formats that a GGUF file has embedding and head in."""
    tensors = open_gguf(path).tensors
    names = {"token_embd.weight", "output.weight"} & set(tensors)
    return {tensors[name].layout.name for name in names}


@pytest.mark.parametrize(
    ("target", "rule", "embedding"),
    [
        ("gguf-q2_0", "128 weights", "128 weights"),
        ("gguf-q2_0", "row", "64 weights"),
        ("gguf-tq2_0", "row", "row"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "tied"])
def test_ternary_embeddings_and_heads_stay_packed_and_come_back_bit_for_bit(
    tmp_path, written_once, kind, target, rule, embedding
):
    source, written = written_once(kind, rule, embedding), tmp_path / "x.gguf"
    assert export(source, written, target).notices == []
    assert stored_as(written) == {target.removeprefix("gguf-").upper()}
    assert all(map(torch.equal, vocabulary(source), vocabulary(written)))
    assert torch.equal(logits_of(load(source, "ternary")), logits_of(load(written, "ternary")))
    again = tmp_path / "again.gguf"
    export(written, again, target)
    tensors = [
        {name: bytes(file.data(name)) for name in file.tensors}
        for file in map(open_gguf, (written, again))
    ]
    assert tensors[0] == tensors[1]


def test_an_embedding_that_blocks_can_not_hold_is_written_as_floats_and_said_to_be(
    tmp_path, written_once
):
    source, written = written_once("tied", "row", "128 weights"), tmp_path / "x.gguf"
    [notice] = export(source, written, "gguf-tq2_0").notices
    assert "embed_tokens has a scale to each 128 weights" in notice
    assert notice.endswith("it is written as floats")
    assert stored_as(written) <= {"F16", "F32"}
    assert all(map(torch.equal, vocabulary(source), vocabulary(written)))


@pytest.mark.parametrize("embedding", ["tensor", "64 weights"])
def test_a_folder_keeps_each_value_of_a_packed_embedding(tmp_path, embedding):
    """Its scales are float16, which bfloat16 doesn't hold; it is read in several parts."""
    source, file, folder, again = (tmp_path / name for name in ("s", "x.gguf", "hf", "y.gguf"))
    write(source, "tied", "tensor", embedding)
    export(source, file, "gguf-q2_0")
    convert(file, folder, "hf", partial(write_gguf_text, file))
    assert all(map(torch.equal, vocabulary(source), vocabulary(folder)))
    export(folder, again, "gguf-q2_0")
    assert all(map(torch.equal, vocabulary(source), vocabulary(again)))


def test_a_file_is_exported_in_the_other_format_and_back(tmp_path, written_once):
    first, second, third = (tmp_path / f"{name}.gguf" for name in "abc")
    export(written_once("llama"), first, "gguf-tq2_0")
    export(first, second, "gguf-q2_0")
    export(second, third, "gguf-tq2_0")
    assert_same(first, second)
    for one in (first, third):
        reader = gguf.GGUFReader(one)
        told = [(t.name, t.tensor_type, t.data.tobytes()) for t in reader.tensors]
        keys = {name: f.contents() for name, f in reader.fields.items() if name != "general.name"}
        if one == first:
            expected, expected_keys = told, keys
    assert told == expected
    assert keys == expected_keys


def test_the_gguf_package_reads_the_same_weights_and_keys(tmp_path, written_once):
    source = written_once("qwen3")
    export(source, tmp_path / "x.gguf", "gguf-tq2_0")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    stored = {t.name: t for t in reader.tensors}
    linear = stored["blk.1.ffn_down.weight"]
    assert linear.tensor_type == gguf.GGMLQuantizationType.TQ2_0
    values = torch.from_numpy(gguf.dequantize(linear.data, linear.tensor_type).copy())
    tensors = load_file(source / "model.safetensors")
    assert torch.equal(values, tensors["model.layers.1.mlp.down_proj.weight"].float())
    assert stored["blk.0.attn_q_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert len(fields["tokenizer.ggml.tokens"]) == SIZES["vocab_size"]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 3]
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    template = read_tokenizer_files(source).templates["default"]
    assert fields["tokenizer.chat_template"] == template


def test_scales_that_float16_lacks_are_rounded_and_said_to_be(tmp_path):
    written = export(builtin.TERNARY, tmp_path / "x.gguf", "gguf-tq2_0")
    assert written.notices == ["scales are rounded to float16, by up to 0.03%"]
    before, after = linears(builtin.TERNARY), linears(tmp_path / "x.gguf")
    for name, (codes, scales) in before.items():
        assert torch.equal(codes, after[name][0])
        assert torch.equal(scales.half().float(), after[name][1])


def test_a_dense_model_is_exported_where_it_is_quantized_alone(tmp_path):
    write_dense(tmp_path / "source", **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(builtin.TERNARY / name, tmp_path / "source" / name)
    with pytest.raises(CheckpointError, match=r"dense, not ternary: .*--quantize makes one"):
        export(tmp_path / "source", tmp_path / "x.gguf", "gguf-q2_0")
    export(tmp_path / "source", tmp_path / "x.gguf", "gguf-q2_0", quantize=True)
    convert(tmp_path / "source", tmp_path / "hf", "hf", quantize=True)
    expected = linears(tmp_path / "hf")
    for name, (codes, _) in linears(tmp_path / "x.gguf").items():
        assert torch.equal(codes, expected[name][0])


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_what_float16_can_not_hold_is_refused_and_nothing_left(tmp_path, scale):
    write(tmp_path / "source", "relu2")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    save_file(tensors | {name: torch.tensor([scale])}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj has scales .* float16 ones"):
        export(tmp_path / "source", tmp_path / "x.gguf", "gguf-q2_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


BAD_TEXTS = {
    '{"top_k": 20.5}': "can say top_k of 20.5",
    '{"top_k": NaN}': "can say top_k of nan",
    '{"top_k": 1e999}': "can say top_k of inf",
    '{"temperature": 1' + "0" * 400 + "}": "can say temperature of 1000",
    '{"top_k": 8589934592}': "holds 'general.sampling.top_k' of 8589934592",
    '{"top_k": -8589934592}': "holds 'general.sampling.top_k' of -8589934592",
    r'{"chat_template": "\ud800"}': r"holds 'tokenizer.chat_template' of '\ud800'",
}


def test_text_that_no_file_can_say_is_refused_and_nothing_left(tmp_path):
    source = tmp_path / "source"
    write(source, "llama")
    config = json.loads((source / "tokenizer_config.json").read_text())
    for text, reason in BAD_TEXTS.items():
        (source / "generation_config.json").write_text(text)
        edited = config | {k: v for k, v in json.loads(text).items() if k == "chat_template"}
        (source / "tokenizer_config.json").write_text(json.dumps(edited))
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            export(source, tmp_path / "x.gguf", "gguf-q2_0")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_recommendation_below_0_is_kept_and_folders_are_made(tmp_path):
    """vLLM takes a top_k of -1 for all tokens."""
    source, written = tmp_path / "source", tmp_path / "some" / "where" / "x.gguf"
    write(source, "llama")
    (source / "generation_config.json").write_text('{"top_k": -1, "temperature": 1}')
    export(source, written, "gguf-tq2_0")
    assert read_gguf_text(written).sampling_defaults == {"top_k": -1, "temperature": 1.0}
    field = gguf.GGUFReader(written).fields["general.sampling.top_k"]
    assert (field.types, field.contents()) == ([gguf.GGUFValueType.INT32], -1)


def test_rows_that_are_no_whole_blocks_and_wrong_names_are_refused(tmp_path):
    write(tmp_path / "source", "llama")
    edit_config(tmp_path / "source", hidden_act="silu")
    small = tmp_path / "small"
    write_packed(small, "llama", linear_class="autobitlinear")
    with pytest.raises(
        CheckpointError, match=r"rows of 128 weights, and TQ2_0 blocks of 256 \(--to"
    ):
        export(small, tmp_path / "x.gguf", "gguf-tq2_0")
    with pytest.raises(CheckpointError, match=r"it ends in \.gguf"):
        export(tmp_path / "source", tmp_path / "x", "gguf-q2_0")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=r"x\.gguf is there already"):
        export(tmp_path / "source", tmp_path / "x.gguf", "gguf-q2_0")


def test_the_command_says_what_it_wrote_and_what_it_rounded(capsys, tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(builtin.TERNARY), str(path), "--to", "gguf-q2_0"])
    captured = capsys.readouterr()
    assert exit_.value.code == 0
    assert captured.out == f"{path}: 3.5 MB of tensors\n"
    assert captured.err == ("bitwatt convert: scales are rounded to float16, by up to 0.03%\n")
