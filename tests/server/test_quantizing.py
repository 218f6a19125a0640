"""Ternary weights of a model that has none are refused, or made and said loudly."""

import re
from pathlib import Path

import pytest
import torch
from bitwatt import LLM, builtin
from bitwatt.checkpoints.quantized import QUANTIZED
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.errors import CheckpointError
from bitwatt.inspection import as_markdown, inspect
from bitwatt_kernels.packing import unpack
from safetensors.torch import load_file, save_file

from tests.server.checkpoints.against_transformers import load, logits_of
from tests.server.checkpoints.writers import edit_config, write_dense, write_packed

LINEAR = "model.layers.1.mlp.down_proj"


def test_a_linear_is_rounded_by_its_mean_magnitude(tmp_path: Path) -> None:
    model = write_dense(tmp_path, "qwen2")
    weight = dict(model.named_parameters())[f"{LINEAR}.weight"].detach().double()
    found = open_checkpoint(tmp_path, quantize=True).ternary(LINEAR, 128, 192, fits=torch.float32)
    scale = weight.abs().mean()
    assert float(found.scales[0]) == pytest.approx(float(scale), rel=1e-6)
    assert (found.scales == found.scales[0]).all()
    ratio = weight / scale
    is_clear = ((ratio.abs() - 0.5).abs() > 1e-5) & ((ratio.abs() - 1.5).abs() > 1e-5)
    expected = ratio.round().clamp(-1, 1)
    assert torch.equal(unpack(found.codes)[is_clear].double(), expected[is_clear])
    assert float(is_clear.double().mean()) > 0.99


def test_a_quantized_model_computes_as_one_of_the_same_masters(tmp_path: Path) -> None:
    for name in ("dense", "masters"):
        write_dense(tmp_path / name, intermediate_size=200)
    online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path / "masters", quantization_config={"quant_method": "bitnet"} | online)
    for weights in ("ternary", "dense"):
        quantized = load(tmp_path / "dense", weights, quantize=True)
        assert torch.equal(logits_of(quantized), logits_of(load(tmp_path / "masters", weights)))
        assert QUANTIZED in quantized.notices


def test_a_ternary_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    write_packed(tmp_path, "llama", linear_class="bitlinear")
    told = rf"^{re.escape(str(tmp_path))}: the linears are ternary already .* leave out --quantize"
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path, quantize=True)


def test_weights_too_large_to_ternarize_are_refused_by_file_and_tensor(tmp_path: Path) -> None:
    write_dense(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LINEAR}.weight"] = torch.full_like(tensors[f"{LINEAR}.weight"], 1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path, quantize=True)
    told = rf"^{re.escape(str(tmp_path))}: tensor '{LINEAR}.weight' makes weights of 1e\+04"
    with pytest.raises(CheckpointError, match=told):
        checkpoint.ternary(LINEAR, 128, 192, fits=torch.float16)


def test_what_is_not_ternary_is_refused_with_the_knob() -> None:
    told = rf"^{re.escape(str(builtin.FP16))}: .* --quantize ternarizes them, at a loss"
    with pytest.raises(CheckpointError, match=told):
        LLM(builtin.FP16, backend="torch")


def test_inspect_says_what_was_done(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((builtin.TERNARY / "tokenizer.json").read_bytes())
    assert inspect(tmp_path)["matrices"] == []
    found = inspect(tmp_path, quantize=True)
    assert len(found["matrices"]) == 14
    assert {row["weights"] for row in found["memory"]} == {"ternary", "dense"}
    assert QUANTIZED in found["warnings"]
    assert "quality is not that of a trained ternary model" in as_markdown(found)
