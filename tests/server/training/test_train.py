import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt.training.checkpoint import LOSS_FILE, RunRecord, load_model, load_record
from bitwatt.training.model import Architecture
from bitwatt.training.schedule import WEIGHT_DECAY, rates_at
from bitwatt.training.train import LoopOptions, Printed, train

from tests.server.training.factories import make_training_config, make_training_data

EAGER = LoopOptions(evaluate_every=10, validation_windows=4, use_compile=False)


def make_record(architecture: Architecture, num_steps: int = 20) -> RunRecord:
    return RunRecord(
        config=make_training_config(architecture, vocab_size=64, max_position=256),
        seed=0,
        learning_rate=1e-2,
        batch_tokens=256,
        text_tokens=10 * 256,
        token_budget=num_steps * 256,
        minute_budget=None,
        dtype="float32",  # not measured, so that two runs agree
    )


@pytest.mark.parametrize("architecture", ["ternary", "llama", "binary"])
def test_twenty_steps_lower_the_loss(architecture: Architecture, tmp_path: Path):
    record = train(make_record(architecture), make_training_data(), tmp_path, EAGER)
    curve = [json.loads(line) for line in (tmp_path / LOSS_FILE).read_text().splitlines()]
    assert [line["step"] for line in curve] == [10, 20]
    assert curve[1]["validation_nats_per_token"] < curve[0]["validation_nats_per_token"] < 4.2
    assert record.num_tokens == curve[1]["tokens"] == 20 * 256
    assert curve[1]["answer_nats_per_token"] < curve[0]["answer_nats_per_token"] < 4.2
    assert load_record(tmp_path) == record


class Interrupting(Printed):
    """Breaks the run off when the loss is logged, after the last checkpoint."""

    def evaluated(self, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch):
    data = make_training_data()
    record = make_record("ternary")
    train(record, data, tmp_path / "whole", EAGER)

    with monkeypatch.context() as patch:
        patch.setattr("bitwatt.training.train.SECONDS_BETWEEN_CHECKPOINTS", 0)
        with pytest.raises(KeyboardInterrupt):
            train(record, data, tmp_path / "parts", EAGER, Interrupting())
    [logged] = (tmp_path / "parts" / LOSS_FILE).read_text().splitlines()
    assert json.loads(logged)["step"] == 10
    assert load_record(tmp_path / "parts").step == 9
    train(record, data, tmp_path / "parts", replace(EAGER, resume=True))

    curves = [(tmp_path / part / LOSS_FILE).read_text().splitlines() for part in ("whole", "parts")]
    losses = [[json.loads(line)["training_nats_per_token"] for line in curve] for curve in curves]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0][1] == losses[1][1]
    whole = load_model(tmp_path / "whole").state_dict()
    for name, tensor in load_model(tmp_path / "parts").state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_resuming_with_other_settings_is_refused(tmp_path: Path):
    data = make_training_data()
    train(make_record("llama", num_steps=1), data, tmp_path, EAGER)
    other = replace(make_record("llama", num_steps=1), learning_rate=1e-3)
    with pytest.raises(ValueError, match="was started as"):
        train(other, data, tmp_path, replace(EAGER, resume=True))


def test_a_finished_run_resumed_with_a_larger_budget_is_extended(tmp_path: Path):
    data = make_training_data()
    train(make_record("ternary", num_steps=10), data, tmp_path, EAGER)
    options = replace(EAGER, resume=True)
    record = train(make_record("ternary", num_steps=20), data, tmp_path, options)
    assert record.step == 20
    assert record.extended_at == (10 * 256,)
    curve = [json.loads(line) for line in (tmp_path / LOSS_FILE).read_text().splitlines()]
    assert [line["step"] for line in curve] == [10, 20]
    assert load_record(tmp_path) == record
    assert train(make_record("ternary", num_steps=20), data, tmp_path, options) == record


def test_a_run_without_an_end_is_refused(tmp_path: Path):
    record = replace(make_record("llama"), token_budget=None)
    with pytest.raises(ValueError, match="a token budget or a minute budget"):
        train(record, make_training_data(), tmp_path, EAGER)


def test_ternary_schedule_has_two_stages_and_the_twins_has_one():
    before, after = (rates_at(progress, "ternary", 1.0) for progress in (0.4999, 0.5))
    assert before.weight_decay == WEIGHT_DECAY
    assert after.weight_decay == 0
    assert after.learning_rate == pytest.approx(before.learning_rate * 2 / 3, rel=1e-3)
    twins = [rates_at(progress, "llama", 1.0) for progress in (0.4999, 0.5)]
    assert twins[0].learning_rate == pytest.approx(twins[1].learning_rate, rel=1e-3)
    assert twins[1].weight_decay == WEIGHT_DECAY


@pytest.mark.parametrize("architecture", ["ternary", "llama"])
def test_learning_rate_warms_up_from_nothing_and_decays_to_almost_nothing(
    architecture: Architecture,
):
    rates = [rates_at(step / 100, architecture, 1.0).learning_rate for step in range(101)]
    assert rates[0] == 0
    assert rates.index(max(rates)) <= 2
    assert 0 < rates[-1] < 0.03
    assert rates[2:] == sorted(rates[2:], reverse=True)
