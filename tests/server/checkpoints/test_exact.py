"""Floats that are exactly ternary are found to be, and packed without loss."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.errors import CheckpointError
from bitwatt.inspection import inspect
from bitwatt_kernels.packing import times_scales, unpack
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.server.checkpoints.against_transformers import load, logits_of
from tests.server.checkpoints.gguf_writer import store, write_gguf
from tests.server.checkpoints.test_gguf import metadata_of, tensors_of
from tests.server.checkpoints.writers import edit_config, random_model, write_dense
from tests.server.test_inspection import check_forecast

SIZES = {"hidden_size": 256, "intermediate_size": 384}
LINEAR = "model.layers.1.mlp.down_proj"
RULES = {"tensor": None, "row": None, "128 weights": 128, "64 weights": 64}


def made_ternary(weight: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """Return a matrix that is exactly ternary by a rule, a row of it zeros."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows + columns)
    shape = {"tensor": (1, 1), "row": (rows, 1)}.get(rule, (rows, columns // (RULES[rule] or 1)))
    scales = (0.02 + 0.05 * torch.rand(shape, generator=generator)).to(dtype)
    codes = torch.randint(-1, 2, weight.shape, generator=generator).to(dtype)
    codes[3] = 0
    wide = scales.repeat_interleave(columns // scales.shape[1], dim=1)
    return codes * wide.expand(rows, -1)


def write(folder: Path, rule: str, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Write a model whose linears are ternary by a rule; return its tensors."""
    write_dense(folder, "qwen3", head_dim=64, **SIZES)
    path = folder / "model.safetensors"
    tensors = {
        name: made_ternary(t, rule, dtype) if "_proj" in name else t.to(dtype)
        for name, t in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_each_scale_rule_is_found_and_every_weight_is_what_it_was(tmp_path, rule, dtype):
    tensors = write(tmp_path, rule, dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.why_dense is None
    assert "exactly ternary" in checkpoint.stored_as
    weight = checkpoint.ternary(LINEAR, 256, 384, fits=torch.bfloat16)
    assert weight.group == RULES[rule]
    values = times_scales(unpack(weight.codes).float(), weight.scales)
    assert torch.equal(values, tensors[f"{LINEAR}.weight"].float())


@pytest.mark.parametrize("rule", RULES)
def test_a_gguf_file_of_float16_is_the_same_model(tmp_path, rule):
    tensors = write(tmp_path / "folder", rule)
    model = random_model("qwen3", 0, head_dim=64, **SIZES)
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    write_gguf(
        tmp_path / "x.gguf",
        metadata_of(model, "qwen3", attention__key_length=64),
        tensors_of(
            model, lambda name, w: store(w, "F16" if w.ndim > 1 else "F32"), is_paired=False
        ),
    )
    logits = [logits_of(load(tmp_path / name, "ternary")) for name in ("folder", "x.gguf")]
    assert torch.equal(*logits)
    assert bool(logits[0].isfinite().all())


def test_dense_weights_are_the_floats_themselves(tmp_path):
    write(tmp_path, "128 weights")
    seen = []
    checkpoint_type = type(open_checkpoint(tmp_path))
    original = checkpoint_type.ternary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint_type, "ternary", lambda *a, **k: seen.append(a) or original(*a, **k)
        )
        load(tmp_path, "dense")
    assert seen == []


def test_a_matrix_that_is_ternary_at_first_alone_is_refused_and_served_dense(tmp_path):
    tensors = write(tmp_path, "64 weights")
    tensors[f"{LINEAR}.weight"][100, 7] = 0.9
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight' has rows of more than one mag"):
        load(tmp_path, "ternary")
    assert bool(logits_of(load(tmp_path, "dense")).isfinite().all())


@pytest.mark.parametrize("linear", ["model.layers.0.self_attn.q_proj", LINEAR])
def test_one_linear_of_other_floats_leaves_the_checkpoint_dense(tmp_path, linear):
    tensors = write(tmp_path, "row")
    noise = torch.randn(tensors[f"{linear}.weight"].shape, generator=torch.Generator())
    tensors[f"{linear}.weight"] = noise.half()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "dense, not ternary" in str(open_checkpoint(tmp_path).why_dense)


def test_zeros_alone_are_not_taken_for_ternary_weights(tmp_path):
    tensors = write(tmp_path, "row")
    zeros = {name: t * 0 if "_proj" in name else t for name, t in tensors.items()}
    save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path).why_dense is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_as_ever(tmp_path, value):
    tensors = write(tmp_path, "row")
    tensors[f"{LINEAR}.weight"][9, 5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for weights in ("ternary", "dense"):
        with pytest.raises(CheckpointError, match=r"down_proj\.weight"):
            load(tmp_path, weights)


STRANGE = {
    "0-D": torch.tensor(1.0),
    "1-D": torch.ones(320),
    "3-D": torch.ones(2, 160, 256),
    "bool": torch.ones(320, 256, dtype=torch.bool),
    "uint16": torch.ones(320, 256, dtype=torch.uint16),
    "float8": torch.ones(320, 256).to(torch.float8_e4m3fn),
    "float64": torch.ones(320, 256, dtype=torch.float64),
}


def test_what_is_no_matrix_of_floats_is_refused_by_its_name(tmp_path):
    tensors = write(tmp_path, "row")
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{LINEAR}.weight"):
        for strange in STRANGE.values():
            path = tmp_path / "model.safetensors"
            save_file(tensors | {name: strange}, path, metadata={"format": "pt"})
            edit_config(tmp_path, tie_word_embeddings=name == "lm_head.weight")
            for weights in ("ternary", "dense"):
                with pytest.raises(CheckpointError, match=re.escape(f"tensor '{name}' ")):
                    load(tmp_path, weights)


def test_a_vector_where_a_gguf_file_has_a_matrix_is_refused_by_its_name(tmp_path):
    write(tmp_path / "folder", "row")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    model = random_model("qwen3", 0, head_dim=64, **SIZES)
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    stored = tensors_of(
        model, lambda name, w: store(w, "F16" if w.ndim > 1 else "F32"), is_paired=False
    )
    metadata = metadata_of(model, "qwen3", attention__key_length=64)
    for name in ("token_embd.weight", "output.weight", "blk.1.ffn_down.weight"):
        vector = {name: store(np.ones(320, np.float32), "F16")}
        write_gguf(tmp_path / "x.gguf", metadata, stored | vector)
        for weights in ("ternary", "dense"):
            with pytest.raises(CheckpointError, match=re.escape(f"tensor '{name}' ")):
                load(tmp_path / "x.gguf", weights)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_checkpoint_of_8_bit_floats_is_refused_by_its_dtype(tmp_path, dtype):
    tensors = write(tmp_path, "row")
    small = {name: t.to(dtype) if "_proj" in name else t for name, t in tensors.items()}
    save_file(small, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "dense, not ternary" in str(open_checkpoint(tmp_path).why_dense)
    with pytest.raises(CheckpointError, match=str(dtype)):
        load(tmp_path, "dense")


def test_each_linear_is_counted_once_and_the_forecast_is_what_engines_report(tmp_path):
    tensors = write(tmp_path, "128 weights")
    found = inspect(tmp_path)
    assert found["parameters"]["all"] == sum(tensor.numel() for tensor in tensors.values())
    assert {matrix["scales"] for matrix in found["matrices"]} == {"128 weights"}
    check_forecast(tmp_path, max_num_seqs=3)
