import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.inspection import inspect
from bitwatt.training.export import export, round_as_exported
from bitwatt.training.model import Architecture, LanguageModel
from bitwatt.training.ternary import BitLinear, binary_codes, ternary_codes, weight_scale
from bitwatt.training.tokenizer import train_tokenizer
from bitwatt_kernels.registry import choose_backend
from safetensors.torch import load_file

from tests.server.model.steps import CPU_BACKENDS, Context, forward, make_kv_cache
from tests.server.training.factories import make_training_config

# torch warns of itself when transformers has it import its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

ARCHITECTURES: tuple[Architecture, ...] = ("ternary", "llama", "binary")
TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(60)]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Keep transformers from compiling its quantizers, which needs a C++ compiler and a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_model(architecture: Architecture) -> LanguageModel:
    config = make_training_config(architecture, hidden_size=64, intermediate_size=128, head_dim=16)
    model = LanguageModel(config, seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2, generator=generator)
    return model


def exported(architecture: Architecture, folder: Path) -> LanguageModel:
    model = make_model(architecture)
    export(model, train_tokenizer(TEXTS, vocab_size=280), folder)
    round_as_exported(model)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_export_and_computes_the_same_logits(
    architecture: Architecture, tmp_path: Path
):
    model = exported(architecture, tmp_path)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for parameter in theirs.parameters():  # it keeps a packed checkpoint's norms in bfloat16
        parameter.data = parameter.data.float()
    tokens = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        ours, other = model(tokens), theirs(tokens).logits
    # Both compute in float32, in another order. A difference of 1e-7 before a rounding can move an
    # activation by one code of 127: of a row's many, so the logits (of size 1) move by under 1%.
    tolerance = 1e-4 if architecture == "llama" else 1e-2
    assert (ours - other).abs().max() < tolerance * ours.abs().max()
    assert (ours - other).abs().mean() < tolerance / 10 * ours.abs().mean()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("architecture", ["ternary", "binary"])
def test_the_ternary_kernels_serve_the_export(
    architecture: Architecture, backend: str, tmp_path: Path
):
    """Signs and their mean magnitude are ternary weights without a 0."""
    model = exported(architecture, tmp_path)
    chosen = choose_backend(torch.device("cpu"), backend).backend
    ours = load_model(tmp_path, weights="ternary", backend=chosen, dtype=torch.float32)
    shares = {matrix["zero"] for matrix in inspect(tmp_path)["matrices"]}
    assert (shares == {0.0}) is (architecture == "binary")
    tokens = list(range(3, 35))
    logits = forward(ours, make_kv_cache(ours, 2), [(Context([0, 1]), tokens)])
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0]
    assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (logits - expected).abs().mean() < 1e-3 * expected.abs().mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_decodes_text_from_the_export(architecture: Architecture, tmp_path: Path):
    exported(architecture, tmp_path)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1, 2]
    prompt = tokenizer("def function", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("def function")


@pytest.mark.parametrize(
    ("architecture", "codes", "kinds"),
    [("ternary", ternary_codes, {-1, 0, 1}), ("binary", binary_codes, {-1, 1})],
)
def test_codes_are_stored_exactly(architecture, codes, kinds, tmp_path: Path):
    model = exported(architecture, tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, BitLinear)
    }
    assert len(linears) == 14
    for name, linear in linears.items():
        stored, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert stored.dtype == torch.uint8
        assert scale.shape == (1,)
        planes = [(stored >> shift & 3).to(torch.float32) - 1 for shift in (0, 2, 4, 6)]
        assert torch.equal(torch.cat(planes) * scale, codes(linear.weight) * scale)
        assert {int(code) for code in torch.cat(planes).unique()} == kinds
        assert scale.item() == weight_scale(linear.weight).item()


def test_config_is_that_of_a_packed_bitnet_checkpoint(tmp_path: Path):
    exported("ternary", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["quantization_config"] == {
        "linear_class": "autobitlinear",
        "quant_method": "bitnet",
        "quantization_mode": "offline",
    }
    names = set(load_file(str(tmp_path / "model.safetensors")))
    assert "lm_head.weight" not in names
    assert "model.layers.0.self_attn.attn_sub_norm.weight" in names
    assert "model.layers.0.mlp.ffn_sub_norm.weight" in names
