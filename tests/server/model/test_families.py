"""A model family whose layers are of a known kind is one entry of FAMILIES."""

import json
from pathlib import Path

import pytest
import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.errors import CheckpointError
from bitwatt.model.families import FAMILIES, Family
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.registry import choose_backend
from safetensors.torch import load_file, save_file

from tests.server.checkpoints.writers import edit_config, write_dense
from tests.server.model.steps import Context, forward, make_kv_cache

NEW = Family(
    architecture="NewForCausalLM",
    activation="silu",
    has_sub_norms=False,
    rope_theta=1e6,
    aliases={"model.layers.": "blocks.", ".self_attn.": ".attention.", "lm_head.": "head."},
    off={"has_experts": (False,)},
)


def load(path: Path) -> Transformer:
    backend = choose_backend(torch.device("cpu"), "torch").backend
    return load_model(path, weights="dense", backend=backend, dtype=torch.float32)


def logits_of(model: Transformer) -> torch.Tensor:
    return forward(model, make_kv_cache(model, 1), [(Context([0]), [3, 1, 4, 1, 5])])


def test_one_entry_serves_a_new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    expected = logits_of(load(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for ours, its in NEW.aliases.items():
        tensors = {name.replace(ours, its): tensor for name, tensor in tensors.items()}
    assert "blocks.0.attention.q_proj.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, architectures=["NewForCausalLM"], has_experts=False, rope_parameters=None)
    with pytest.raises(CheckpointError, match="'NewForCausalLM' is not supported"):
        load(tmp_path)
    monkeypatch.setitem(FAMILIES, NEW.architecture, NEW)
    assert torch.equal(logits_of(load(tmp_path)), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"},
            "'Qwen3_5ForConditionalGeneration' is not supported: its gated delta net, and the rot",
        ),
        ({"architectures": None, "model_type": "qwen3_5"}, "'qwen3_5' is not .* gated delta net"),
        ({"architectures": ["Qwen3_5MoeForCausalLM"]}, "gated delta net and its experts are"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "gated delta net and its experts are"),
        ({"architectures": ["MapleForCausalLM"]}, "a mixture of experts, whose routing is missing"),
        ({"model_type": "maple"}, "'maple' is not supported: its layers are a mixture of experts"),
        ({"prism_hadamard": {"version": 1}}, "'prism_hadamard': the weights are in a rotated ba"),
        ({"hadamard_block_size": 1024}, "'hadamard_block_size': the weights are in a rotated"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "'Qwen3MoeForCausalLM' is not supported; "),
    ],
)
def test_known_models_that_are_not_served_are_told_what_is_missing(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_dense(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{reason}"):
        load(tmp_path)


def test_what_a_family_does_not_support_is_its_own_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, NEW.architecture, NEW)
    write_dense(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert NEW.read_config(config | {"attention_bias": True}).num_layers == 2
    with pytest.raises(CheckpointError, match="has_experts=True"):
        NEW.read_config(config | {"has_experts": True})
