"""A run tells how far it is, stops where it is told to, and leaves its curve and its card."""

import io
import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt.knobs import Shown
from bitwatt.studies import TrainSettings
from bitwatt.training.card import command
from bitwatt.training.checkpoint import RUN_FILE, RunRecord, load_model
from bitwatt.training.model import DEFAULT_LEARNING_RATES, SIZES, Architecture
from bitwatt.training.pipeline import VALIDATION_FILE, export_run, run
from bitwatt.training.progress import Progress, ended_by_ctrl_c

from tests.server.training.test_pipeline import EAGER, make_material, make_record

LINE: dict[str, Any] = {
    "step": 5,
    "tokens": 320,
    "minutes": 0.1,
    "training_nats_per_token": 5.1,
    "validation_nats_per_token": 5.25,
    "answer_nats_per_token": 4.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Stopping:
    """Stops the run after so many steps."""

    def __init__(self, num_steps: int):
        self.is_stopped = False
        self.num_left = num_steps

    def stepped(self, record: RunRecord, loss: float) -> None:
        self.num_left -= 1
        self.is_stopped = self.num_left == 0

    def evaluated(self, line: dict[str, Any]) -> None:
        pass


def test_a_bar_has_tokens_a_second_and_the_time_left():
    moments = iter([100.0, 102.0])
    out = Terminal()
    progress = Progress(out, clock=lambda: next(moments))
    record = make_record("ternary")  # 10 steps of 64 tokens
    progress.stepped(replace(record, step=1), 5.5)
    progress.stepped(replace(record, step=5), 2.25)
    progress.evaluated(LINE)
    shown = out.getvalue().split("\r\x1b[K")
    # 4 steps of 64 tokens and of a tenth of the run each in 2 s: half of it takes 2.5 s more
    assert shown[2] == "████████████············ 50%, loss 2.250, 128 tokens/s, 2 s left"
    assert shown[3].startswith("320 tokens, 0.1 min: training 5.100, held-out text 5.250")


def test_without_a_terminal_there_are_lines_alone():
    out = io.StringIO()
    progress = Progress(out)
    progress.stepped(replace(make_record("ternary"), step=1), 5.5)
    assert out.getvalue() == ""
    progress.evaluated(LINE)
    progress.clear()
    assert out.getvalue().count("\n") == 1


def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not(tmp_path: Path):
    material = make_material()
    asked = replace(make_record("ternary"), dtype="float32")
    record = run(asked, material, tmp_path / "a", EAGER, Stopping(4))
    assert record.step == 4
    assert not (tmp_path / "a" / VALIDATION_FILE).exists()
    run(asked, material, tmp_path / "a", replace(EAGER, resume=True))
    run(asked, material, tmp_path / "b", EAGER)
    for one, other in zip(
        load_model(tmp_path / "a").parameters(),
        load_model(tmp_path / "b").parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_finished_run_is_exported_with_its_card_and_curve(tmp_path: Path):
    run(make_record("ternary"), make_material(), tmp_path, EAGER)
    export_run(tmp_path, tmp_path / "model", "1 CPU core")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("# A small ternary model, trained by bitwatt")
    assert "640 tokens in 10 steps of 64" in card
    assert (tmp_path / "model" / "model.safetensors").is_file()
    head, *rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert head.startswith("step,tokens,minutes,learning_rate,training_nats_per_token")
    assert [row.split(",")[1] for row in rows] == ["320", "640"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / RUN_FILE).read_text())["step"] == 10


def test_the_command_on_a_card_names_the_size():
    record = replace(make_record("llama"), config=replace(SIZES["6M"], architecture="llama"))
    assert " --arch llama --size 6M --out runs/llama --tokens" in command(record)
    assert "--size" not in command(make_record("llama"))


def test_the_command_knows_the_trainers_sizes_and_architectures():
    fields = TrainSettings.model_fields
    assert fields["size"].annotation.__args__ == tuple(SIZES)  # type: ignore[union-attr]
    assert fields["arch"].annotation == Architecture
    [shown] = [mark for mark in fields["lr"].metadata if isinstance(mark, Shown)]
    told = re.findall(r"\d\S*\d", str(shown.default))
    rates = DEFAULT_LEARNING_RATES
    assert [float(rate) for rate in told] == [rates["ternary"], rates["llama"]]
    assert rates["binary"] == rates["ternary"]


def test_ctrl_c_ends_a_run_after_its_step_and_twice_at_once():
    watch = Stopping(1000)
    before = signal.getsignal(signal.SIGINT)
    with ended_by_ctrl_c(watch):
        signal.raise_signal(signal.SIGINT)
        assert watch.is_stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
