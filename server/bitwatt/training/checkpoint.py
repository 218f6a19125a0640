"""A run on disk: float32 masters and optimizer state in safetensors, the rest in JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from bitwatt.training.model import LanguageModel, ModelConfig
from bitwatt.training.optimizer import Optimizers

STATE_FILE = "state.safetensors"
RUN_FILE = "run.json"
LOSS_FILE = "loss.jsonl"

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run was told and how far it has come; the model card is written from it.

    token_budget and minute_budget say where it ends, whichever comes first; None is no limit.
    text_tokens is the length of the text phase; instructions follow it.
    dtype is what matrices are multiplied in, None until the run has measured which is faster.
    extended_at holds the tokens seen whenever a finished run was resumed with a larger budget.
    """

    config: ModelConfig
    seed: int
    learning_rate: float
    batch_tokens: int
    text_tokens: int
    token_budget: int | None
    minute_budget: float | None
    dtype: Dtype | None = None
    step: int = 0
    minutes: float = 0.0
    extended_at: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Training tokens seen so far."""
        return self.step * self.batch_tokens

    @property
    def progress(self) -> float:
        """The share of the budget that is used, 0 to 1 and a little over at the end."""
        by_tokens = self.num_tokens / self.token_budget if self.token_budget else 0.0
        by_minutes = self.minutes / self.minute_budget if self.minute_budget else 0.0
        return max(by_tokens, by_minutes)


def save_run(folder: Path, record: RunRecord, model: LanguageModel, optimizers: Optimizers) -> None:
    """Write the run to `folder`, each of the two files replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors | optimizers.state(), str(folder / (STATE_FILE + ".new")))
    (folder / (RUN_FILE + ".new")).write_text(json.dumps(asdict(record), indent=2) + "\n")
    for name in (STATE_FILE, RUN_FILE):
        (folder / (name + ".new")).replace(folder / name)


def load_record(folder: Path) -> RunRecord:
    """Return the record that `save_run` wrote to `folder`."""
    fields = json.loads((folder / RUN_FILE).read_text())
    fields["config"] = ModelConfig(**fields["config"])
    fields["extended_at"] = tuple(fields.get("extended_at", ()))
    return RunRecord(**fields)


def load_model(folder: Path) -> LanguageModel:
    """Return the model that `save_run` wrote to `folder`, with its float32 masters."""
    model = LanguageModel(load_record(folder).config)
    model.load_state_dict(_tensors_under("model", load_file(str(folder / STATE_FILE))))
    return model


def load_optimizers(folder: Path, optimizers: Optimizers) -> None:
    """Give `optimizers`, made for the run's model, the state that `save_run` wrote to `folder`."""
    tensors = load_file(str(folder / STATE_FILE))
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith("model/")}
    optimizers.load_state(state)


def _tensors_under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{prefix}/"): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{prefix}/")
    }
