from dataclasses import replace
from pathlib import Path

import pytest
from bitwatt.training.__main__ import build_parser, main
from bitwatt.training.card import load_curve
from bitwatt.training.checkpoint import LOSS_FILE, RunRecord
from bitwatt.training.model import Architecture
from bitwatt.training.pipeline import SWEEP_FILE, Material, export_pair, run, sweep
from bitwatt.training.tokenizer import train_tokenizer
from bitwatt.training.train import LoopOptions

from tests.server.training.factories import make_training_config, make_training_data

EAGER = LoopOptions(evaluate_every=5, validation_windows=2, use_compile=False)


def make_material() -> Material:
    texts = [f'def f{i}(x):\n    """Return x and {i}."""\n    return x + {i}\n' for i in range(80)]
    return Material(train_tokenizer(texts, vocab_size=280), make_training_data())


def make_record(architecture: Architecture) -> RunRecord:
    return RunRecord(
        config=make_training_config(architecture, num_layers=1),
        seed=0,
        learning_rate=3e-3,
        batch_tokens=64,
        text_tokens=128,
        token_budget=640,
        minute_budget=None,
    )


def test_a_pair_is_trained_and_exported_with_both_losses_on_both_cards(tmp_path: Path):
    material, runs, out = make_material(), tmp_path / "runs", tmp_path / "out"
    runs.mkdir()
    sweep(make_record("ternary"), [1e-3, 2e-3], material, runs, EAGER)
    run(make_record("ternary"), material, runs / "ternary", EAGER)
    export_pair(runs, out, hardware="1 CPU core")
    assert not (out / "fp16").exists()
    run(replace(make_record("llama"), learning_rate=1e-3), material, runs / "llama", EAGER)
    export_pair(runs, out, hardware="1 CPU core")

    for folder, learning_rate in (("ternary", "0.003"), ("fp16", "0.001")):
        card = (out / folder / "README.md").read_text()
        assert f"--tokens 640 --text-tokens 128 --lr {learning_rate}" in card
        assert "640 tokens in 10 steps of 64" in card
        assert "on 1 CPU core." in card
        assert "| ternary |" in card
        assert "| 16-bit twin |" in card
        assert "| ternary | 0.002 | 640 |" in card
        assert (out / folder / "model.safetensors").is_file()
        assert len(load_curve(out / folder / LOSS_FILE)) == 2
    assert len(load_curve(runs / SWEEP_FILE)) == 2


def test_help_shows_every_command_and_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for command in ("train", "sweep", "sizes", "pair", "export"):
        assert command in text
    assert "python -m bitwatt.training pair --tokens 20e6" in text


def test_a_run_without_a_budget_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["pair"])
    assert "--tokens or --minutes" in capsys.readouterr().err
