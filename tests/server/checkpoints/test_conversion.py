"""Conversions hold what the source holds, bit for bit, and are read by transformers too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt import builtin
from bitwatt.checkpoints import conversion
from bitwatt.checkpoints.conversion import convert
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.cli import main
from bitwatt.errors import CheckpointError
from safetensors.torch import load_file, save_file

from tests.server.checkpoints.writers import (
    edit_config,
    sizes,
    write_dense,
    write_online,
    write_packed,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def linears(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return codes and scales of every ternary linear."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found = {}
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            full = f"model.layers.{layer}.{name}"
            weight = checkpoint.ternary(full, *shape, fits=torch.float32)
            found[full] = (weight.codes, weight.scales)
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def others(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: t for name, t in tensors.items() if "_proj." not in name}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        pairs = zip(value, right[name], strict=True) if isinstance(value, tuple) else ()
        for one, other in pairs or [(value, right[name])]:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


def write(folder: Path, how: str) -> None:
    match how:
        case "masters":
            write_online(folder, "bitnet", intermediate_size=300)
        case "1bitLLM's masters":
            write_online(folder, "bitnet", hidden_act="silu")
            edit_config(folder, architectures=["BitnetForCausalLM"], quantization_config=None)
        case "divided by the scale":
            write_packed(folder, "llama", linear_class="bitlinear", rope_parameters=LLAMA3)
        case "float codes":
            write_packed(folder, "bitnet", linear_class="autobitlinear", is_unpacked=True)
        case _:
            write_packed(folder, "llama", linear_class="autobitlinear", tie_word_embeddings=True)


HOW = ["masters", "1bitLLM's masters", "divided by the scale", "float codes", "multiplied"]


@pytest.mark.parametrize("how", HOW)
def test_packed_codes_scales_and_everything_else_stay_bit_for_bit(tmp_path, how):
    source, packed, again = tmp_path / "source", tmp_path / "packed", tmp_path / "again"
    write(source, how)
    assert convert(source, packed, "hf") == sum(
        t.nbytes for t in load_file(packed / "model.safetensors").values()
    )
    assert_equal(linears(source), linears(packed))
    assert_equal(others(source), others(packed))
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert quantization["linear_class"] == "autobitlinear"
    convert(packed, again, "hf")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (packed / name).read_bytes()
    assert names_in(tmp_path) == ["again", "packed", "source"]


def test_norms_of_linears_are_kept_or_the_conversion_is_refused(tmp_path):
    source, packed = tmp_path / "source", tmp_path / "packed"
    write_packed(source, "llama", linear_class="bitlinear", norm_eps=1e-4)
    convert(source, packed, "hf")
    assert open_checkpoint(packed).config == open_checkpoint(source).config
    before, after = (load_file(folder / "model.safetensors") for folder in (source, packed))
    norms = [name for name in before if name.endswith("rms_norm.weight")]
    assert len(norms) == 14
    assert all(torch.equal(before[name], after[name]) for name in norms)
    with pytest.raises(CheckpointError, match=r"a norm of its own .* \(--to hf keeps it\)"):
        convert(source, tmp_path / "dense", "bf16")
    assert names_in(tmp_path) == ["packed", "source"]


@pytest.mark.parametrize("how", HOW)
def test_in_bfloat16_a_linear_is_what_the_dense_backend_makes_of_it(tmp_path, how):
    source, dense = tmp_path / "source", tmp_path / "dense"
    write(source, how)
    convert(source, dense, "bf16")
    tensors = load_file(dense / "model.safetensors")
    for name, (codes, scales) in linears(source).items():
        weight = tensors[f"{name}.weight"]
        planes = [(codes >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)]
        values = torch.cat(planes, dim=1)[:, : weight.shape[1]].bfloat16()
        assert torch.equal(weight, values * scales.bfloat16()[:, None])
    assert not open_checkpoint(dense).is_ternary
    for name, tensor in others(source).items():
        expected = tensor if "norm" in name else tensor.bfloat16()
        assert torch.equal(tensors[name], expected)
        assert tensors[name].dtype == expected.dtype


@pytest.mark.parametrize("family", ["bitnet", "llama"])
def test_transformers_reads_a_dense_conversion_as_it_read_the_source(tmp_path, family):
    from transformers import AutoModelForCausalLM  # seconds, of every worker that collects

    source, dense = tmp_path / "source", tmp_path / "dense"
    model = write_dense(source, family, rope_parameters=LLAMA3, eos_token_id=[2, 5])
    convert(source, dense, "bf16")
    assert open_checkpoint(dense).config == open_checkpoint(source).config
    read = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokens = torch.arange(3, 103).reshape(1, -1)  # past the original context
    with torch.no_grad():
        rounded = {
            n: t if "norm" in n else t.bfloat16().float() for n, t in model.state_dict().items()
        }
        model.load_state_dict(rounded)
        assert torch.equal(read(tokens).logits, model(tokens).logits)
    assert read.config.max_position_embeddings == sizes()["max_position_embeddings"]


def test_the_embedded_model_is_what_it_was_with_its_tokenizer(tmp_path):
    convert(builtin.TERNARY, tmp_path / "x", "hf")
    assert_equal(linears(builtin.TERNARY), linears(tmp_path / "x"))
    assert open_checkpoint(builtin.TERNARY).config == open_checkpoint(tmp_path / "x").config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (builtin.TERNARY / name).read_bytes()


def test_large_models_are_split_and_read_again(tmp_path, monkeypatch):
    source, split = tmp_path / "source", tmp_path / "split"
    write_packed(source, "bitnet", linear_class="bitlinear")
    monkeypatch.setattr(conversion, "_MAX_SHARD_BYTES", 100_000)
    num_bytes = convert(source, split, "hf")
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names_in(split) == [
        "config.json",
        "generation_config.json",
        *shards,
        "model.safetensors.index.json",
    ]
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == num_bytes
    assert_equal(linears(source), linears(split))


def test_links_are_followed_and_further_templates_come_along(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_dense(source)
    (tmp_path / "blob").write_text("template")
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (source / name).symlink_to(tmp_path / "blob")
    convert(source, copy, "hf")
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (copy / name).read_text() == "template"
        assert not (copy / name).is_symlink()
    assert_equal(load_file(source / "model.safetensors"), load_file(copy / "model.safetensors"))


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_dense(source)
    path = source / "model.safetensors"
    save_file(
        load_file(path) | {"extra": torch.zeros(1)},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="'extra' has no place"):
        convert(source, copy, "hf")
    assert names_in(tmp_path) == ["source"]


def test_what_is_there_is_never_written_to(tmp_path):
    write_dense(tmp_path / "source")
    with pytest.raises(CheckpointError, match="source is there already; give another"):
        convert(tmp_path / "source", tmp_path / "source", "hf")
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.partial is there already, of a conversion"):
        convert(tmp_path / "source", tmp_path / "x", "hf")
    (tmp_path / "x.partial").rmdir()
    (tmp_path / "x").mkdir()  # empty
    convert(tmp_path / "source", tmp_path / "x", "hf")
    assert (tmp_path / "x" / "config.json").is_file()


def test_the_command_says_what_it_wrote(capsys, tmp_path):
    def run(*args: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *args])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    destination = str(tmp_path / "x")
    arguments = (str(builtin.TERNARY), destination, "--to", "hf")
    assert run(*arguments) == (0, f"{destination}: 3.3 MB of tensors\n", "")
    status, _, error = run(*arguments)
    assert status == 1
    assert error.startswith(f"bitwatt convert: {destination} is there already; give another")
    status, _, error = run(str(builtin.TERNARY), destination, "--to", "gguf")
    assert status == 2
    assert "--to 'gguf'" in error
    status, _, error = run(str(builtin.TERNARY), destination)
    assert (status, error) == (2, "bitwatt: --to: Field required (BITWATT_CONVERT_TO)\n")
