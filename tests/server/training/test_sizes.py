"""The gap of ternary weights is measured at several sizes, and stands beside the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bitwatt.training.checkpoint import RunRecord
from bitwatt.training.model import SIZES, Architecture
from bitwatt.training.pipeline import VALIDATION_FILE
from bitwatt.training.sizes import save_table, sizes_as_markdown, sizes_table, train_sizes
from bitwatt.training.train import Printed

from tests.server.training.factories import make_training_config
from tests.server.training.test_pipeline import EAGER, make_material, make_record

RATES: dict[Architecture, float] = {"ternary": 3e-3, "llama": 2e-3}


class Watch(Printed):
    """Stops after so many steps in all."""

    def __init__(self, num_steps: int = 1000) -> None:
        super().__init__()
        self.num_steps = 0
        self.max_steps = num_steps

    def stepped(self, record: RunRecord, loss: float) -> None:
        self.num_steps += 1
        self.is_stopped = self.num_steps == self.max_steps


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "2M", make_training_config(num_layers=1))
    monkeypatch.setitem(SIZES, "6M", make_training_config(num_layers=2))


def test_sizes_are_trained_resumably_and_compared(tmp_path: Path):
    material, record = make_material(), make_record("ternary")  # 10 steps each
    watch = Watch(25)
    train_sizes(record, ["2M", "6M"], RATES, material, tmp_path, EAGER, watch)
    assert watch.num_steps == 25
    assert [row["size"] for row in sizes_table(tmp_path)] == ["2M"]

    resuming, watch = replace(EAGER, resume=True), Watch()
    train_sizes(record, ["2M", "6M"], RATES, material, tmp_path, resuming, watch)
    assert watch.num_steps == 15  # what was done isn't done again
    train_sizes(record, ["6M"], {"binary": 3e-3}, material, tmp_path, resuming, Watch())

    rows = sizes_table(tmp_path)
    save_table(rows, tmp_path)
    assert json.loads((tmp_path / "sizes.json").read_text()) == rows
    assert [row["size"] for row in rows] == ["2M", "6M"]
    losses = {
        name: json.loads((tmp_path / "6M" / name / VALIDATION_FILE).read_text())
        for name in ("ternary", "llama", "binary")
    }
    gaps = rows[1]["gaps"]
    for name in ("ternary", "binary"):
        gap = losses[name]["nats_per_token"] - losses["llama"]["nats_per_token"]
        assert gaps[name]["text"] == pytest.approx(gap)
    assert rows[1]["models"]["llama"]["learning_rate"] == 2e-3

    text = sizes_as_markdown(rows)
    assert f"| 640 | {losses['ternary']['nats_per_token']:.3f} |" in text
    assert f"| {gaps['ternary']['text']:+.3f} | {gaps['ternary']['answers']:+.3f} |" in text
    for size, gap in (("700M", "+0.043"), ("1.3B", "+0.004"), ("3B", "-0.013")):
        assert f"| {size}, the paper |  |  |  | {gap} |" in text


def test_runs_of_unlike_budgets_have_no_gap(tmp_path: Path):
    material, record = make_material(), make_record("ternary")
    train_sizes(record, ["2M"], {"ternary": 3e-3}, material, tmp_path, EAGER, Watch())
    longer = replace(record, token_budget=1280)
    train_sizes(longer, ["2M"], {"llama": 3e-3}, material, tmp_path, EAGER, Watch())
    [row] = sizes_table(tmp_path)
    assert row["gaps"] == {}
    assert sizes_as_markdown([row]).count("| 0.0M | 640 |") == 1


def test_resuming_a_finished_run_with_other_settings_is_refused(tmp_path: Path):
    material, record = make_material(), make_record("ternary")
    rates: dict[Architecture, float] = {"ternary": 3e-3}
    train_sizes(record, ["2M"], rates, material, tmp_path, EAGER, Watch())
    other: dict[Architecture, float] = {"ternary": 4e-3}
    with pytest.raises(ValueError, match="was started as"):
        train_sizes(record, ["2M"], other, material, tmp_path, replace(EAGER, resume=True), Watch())
