"""A run on disk: float32 masters and optimizer state in safetensors, the rest in JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bitwatt.training.model import LanguageModel, ModelConfig

STATE_FILE = "state.safetensors"
RUN_FILE = "run.json"
LOSS_FILE = "loss.jsonl"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run was told and how far it has come; the model card is written from it.

    token_budget and minute_budget say where it ends, whichever comes first; None is no limit.
    extended_at holds the tokens seen whenever a finished run was resumed with a larger budget.
    """

    config: ModelConfig
    seed: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    token_budget: int | None
    minute_budget: float | None
    step: int = 0
    minutes: float = 0.0
    extended_at: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Training tokens seen so far."""
        return self.step * self.batch_size * self.sequence_length

    @property
    def progress(self) -> float:
        """The share of the budget that is used, 0 to 1 and a little over at the end."""
        by_tokens = self.num_tokens / self.token_budget if self.token_budget else 0.0
        by_minutes = self.minutes / self.minute_budget if self.minute_budget else 0.0
        return max(by_tokens, by_minutes)


def save_run(
    folder: Path, record: RunRecord, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> None:
    """Write the run to `folder`, each of the two files replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in model.named_parameters()]
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{key}/{names[index]}": tensor for key, tensor in state.items()}
    save_file(tensors, str(folder / (STATE_FILE + ".new")))
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


def load_optimizer_state(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> None:
    """Give `optimizer`, made for `model`, the moments that `save_run` wrote to `folder`."""
    tensors = load_file(str(folder / STATE_FILE))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        state[index] = {
            key.partition("/")[0]: tensor
            for key, tensor in tensors.items()
            if key.partition("/")[2] == name and not key.startswith("model/")
        }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _tensors_under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{prefix}/"): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{prefix}/")
    }
