"""What `bitwatt inspect` says of checkpoints, and that its forecast of memory is the engine's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt import builtin
from bitwatt.cli import main
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig
from bitwatt.inspection import inspect
from safetensors.torch import load_file, save_file

from tests.server.checkpoints.writers import edit_config, write_dense, write_online, write_packed

MEMORY = ("packed_weights_bytes", "embedding_bytes", "other_weights_bytes", "kv_cache_bytes")


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def check_forecast(folder: Path, **engine: Any) -> None:
    """Compare the forecast with what engines of this machine report."""
    rows = [row for row in inspect(folder, **engine)["memory"] if row["backend"] != "triton"]
    assert len(rows) in (3, 6)
    for row in rows:
        settings = EngineConfig(
            model_path=str(folder),
            weights=row["weights"],
            backend=row["backend"],
            device="cpu",
            num_threads=1,
            **engine,
        )
        _, info = build_engine(settings)
        assert {name: row[name] for name in MEMORY} == {
            name: getattr(info.memory, name) for name in MEMORY
        }
        assert row["max_model_len"] == info.max_model_len


@pytest.mark.parametrize("folder", [builtin.TERNARY, builtin.FP16], ids=["ternary", "16-bit"])
def test_the_forecast_for_the_embedded_pair_is_what_engines_report(folder):
    check_forecast(folder, max_num_seqs=3)


@pytest.mark.parametrize(
    "engine",
    [
        {"head_bits": 8},
        {"dtype": "float32", "max_model_len": 100},
        {"kv_cache_bytes": 2**18, "max_num_seqs": 7},
        {"kv_cache_dtype": "int8", "max_num_seqs": 3},
        {"kv_cache_dtype": "float16", "kv_cache_bytes": 2**18},
    ],
    ids=str,
)
def test_the_forecast_counts_what_sizes_are_filled_up_to(tmp_path, engine):
    """330 ids and 300 weights a row fill neither row blocks of 32 nor rows of 64."""
    write_packed(
        tmp_path,
        "bitnet",
        linear_class="bitlinear",
        vocab_size=330,
        intermediate_size=300,
        tie_word_embeddings=False,
    )
    check_forecast(tmp_path, **engine)


def test_what_an_engine_would_refuse_stands_in_place_of_its_memory():
    found = inspect(builtin.TERNARY, dtype="float16", max_model_len=1024, kv_cache_bytes=2**16)
    ternary, *_, dense = found["memory"]
    assert ternary["refused"].startswith("the KV cache holds 16 tokens; one sequence may have 1024")
    assert "relu² passes float16's largest value" in dense["refused"]
    rows = inspect(builtin.TERNARY, kv_cache_dtype="int8")["memory"]
    assert not any("refused" in row for row in rows)  # each has such caches


def test_the_embedded_model_is_told_by_kind_and_by_matrix():
    found = inspect(builtin.TERNARY)
    assert found["family"] == "BitNetForCausalLM"
    assert found["stored_as"] == "ternary values; W = t · weight_scale"
    assert found["parameters"]["all"] == 5_776_640
    assert found["refused"] == found["warnings"] == []
    assert len(found["matrices"]) == 6 * 7
    matrix = next(m for m in found["matrices"] if m["name"] == "model.layers.2.mlp.down_proj")
    tensors = load_file(builtin.TERNARY / "model.safetensors")
    packed = tensors["model.layers.2.mlp.down_proj.weight"]
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    shares = [float((codes == code).double().mean()) for code in range(3)]
    assert [matrix[name] for name in ("minus", "zero", "plus")] == pytest.approx(shares)
    scale = float(tensors["model.layers.2.mlp.down_proj.weight_scale"])
    assert (matrix["lowest"], matrix["highest"], matrix["scales"]) == (scale, scale, "tensor")


def test_a_dense_model_has_no_ternary_memory(tmp_path):
    write_dense(tmp_path)
    found = inspect(tmp_path)
    assert found["stored_as"] == "floats"
    assert {row["weights"] for row in found["memory"]} == {"dense"}
    assert found["matrices"] == []


@pytest.mark.parametrize(
    ("written", "read"), [("autobitlinear", "bitlinear"), ("bitlinear", "autobitlinear")]
)
def test_scales_that_are_read_the_wrong_way_round_are_warned_of(tmp_path, written, read):
    write_packed(tmp_path, "llama", linear_class=written)
    assert inspect(tmp_path)["warnings"] == []
    quantization = {"quant_method": "bitnet", "linear_class": read}
    edit_config(tmp_path, quantization_config=quantization)
    [told] = inspect(tmp_path)["warnings"]
    assert told.startswith("the scales look inverted: half of the matrices have weights of ±")


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    write_packed(tmp_path, "bitnet", linear_class="bitlinear")
    layer = "model.layers.0"
    edit_tensors(
        tmp_path,
        **{
            "model.norm.weight": torch.full((128,), torch.nan),
            f"{layer}.mlp.up_proj.weight": torch.full((48, 128), 3, dtype=torch.uint8),
            f"{layer}.self_attn.k_proj.weight": torch.full((16, 128), 85, dtype=torch.uint8),
        },
    )
    found = inspect(tmp_path)
    told = "\n".join(found["refused"])
    assert "'model.norm.weight' has values that are not finite" in told
    assert f"'{layer}.mlp.up_proj.weight' has a code of 3" in told
    assert "tokenizer.json is missing" in told
    assert len(found["refused"]) == 3
    [zeros] = found["warnings"]
    assert f"'{layer}.self_attn.k_proj.weight' is all zeros" in zeros
    edit_tensors(
        tmp_path,
        **{
            "model.norm.weight": torch.ones(128),
            f"{layer}.mlp.up_proj.weight": torch.zeros(48, 128, dtype=torch.uint8),
            "extra": torch.zeros(1),
        },
    )
    assert "'extra' has no place in this model" in inspect(tmp_path)["refused"][0]


def test_masters_are_ternarized_and_that_is_a_warning(tmp_path):
    write_online(tmp_path, "bitnet")
    found = inspect(tmp_path)
    assert found["stored_as"] == "float masters, ternarized by their mean magnitude"
    assert "of a model that was not trained as BitNet b1.58" in found["warnings"][0]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", *args])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_the_command_prints_tables_and_writes_json(capsys, tmp_path):
    path = tmp_path / "found.json"
    status, out, err = run(capsys, str(builtin.TERNARY), "--json", str(path), "--max-num-seqs", "2")
    assert (status, err) == (0, "")
    assert "| down_proj | 6 | 256 × 768 | 28–30.5 % |" in out
    assert "| ternary | native | 1.2 | 2.1 | 0.3 | 6.3 | 9.9 | 1024 |" in out
    assert json.loads(path.read_text())["memory"][0]["kv_cache_bytes"] == 6_291_456


def test_the_status_of_a_model_that_cant_be_served_is_1(capsys, tmp_path):
    write_dense(tmp_path)
    status, out, _ = run(capsys, str(tmp_path))
    assert status == 1
    assert "Refused:\n- " in out
    (tmp_path / "config.json").write_text("{}")
    status, out, err = run(capsys, str(tmp_path))
    assert (status, out) == (1, "")
    assert "architectures is None" in err
