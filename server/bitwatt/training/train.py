"""The training loop: AdamW over a fixed order of batches, until the budget is used."""

import json
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitwatt.training.checkpoint import (
    LOSS_FILE,
    RunRecord,
    load_model,
    load_optimizer_state,
    load_record,
    save_run,
)
from bitwatt.training.data import Batches, TokenStream
from bitwatt.training.model import LanguageModel
from bitwatt.training.schedule import Rates, rates_at

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
SECONDS_BETWEEN_CHECKPOINTS = 300


@dataclass(frozen=True, slots=True)
class Validation:
    """The held-out loss, by token and by byte of text."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How a run reports and computes; none of it changes what is learned, but for rounding."""

    evaluate_every: int = 200
    validation_windows: int = 32
    use_compile: bool = True
    resume: bool = False


def train(
    record: RunRecord,
    training: TokenStream,
    held_out: TokenStream,
    folder: Path,
    options: LoopOptions,
) -> RunRecord:
    """Train until the budget of `record` is used and return the record of what was done.

    `folder` gets the checkpoint and `loss.jsonl`, a line an evaluation. With `options.resume` the
    run that lies there goes on, and `record` must ask for the same but for the budget: a larger
    one extends a finished run, whose learning rate then rises again to what the schedule says.
    Raises ValueError if it asks for something else, or if neither budget is given.
    """
    if record.token_budget is None and record.minute_budget is None:
        raise ValueError("a run needs an end: a token budget or a minute budget")
    if options.resume:
        record = _resumed(record, load_record(folder))
        model = load_model(folder)
    else:
        model = LanguageModel(record.config, seed=record.seed)
    optimizer = _optimizer(model)
    if options.resume:
        load_optimizer_state(folder, model, optimizer)
    batches = Batches(training, record.batch_size, record.sequence_length, record.seed)
    loss_of = torch.compile(model.loss) if options.use_compile else model.loss

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOSS_FILE
    lines = path.read_text().splitlines() if options.resume else []
    # What a broken-off run logged after its checkpoint is about to be done again.
    kept = [line for line in lines if json.loads(line)["step"] <= record.step]
    path.write_text("".join(f"{line}\n" for line in kept))
    recent = torch.zeros(())
    num_recent = 0
    clock = _Clock(record.minutes)
    saved_at = clock.minutes
    while record.progress < 1:
        rates = rates_at(record.progress, record.config.architecture, record.learning_rate)
        _set_rates(optimizer, rates)
        with _autocast():
            loss = loss_of(*batches.at(record.step))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.detach()
        num_recent += 1
        record = replace(record, step=record.step + 1, minutes=clock.minutes)
        if record.step % options.evaluate_every == 0 or record.progress >= 1:
            with _autocast():
                validation = evaluate(
                    model, held_out, record.sequence_length, options.validation_windows
                )
            _log(path, record, float(recent) / num_recent, validation, rates)
            recent, num_recent = torch.zeros(()), 0
        if (clock.minutes - saved_at) * 60 > SECONDS_BETWEEN_CHECKPOINTS:
            save_run(folder, record, model, optimizer)
            saved_at = clock.minutes
    save_run(folder, record, model, optimizer)
    return record


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: TokenStream,
    sequence_length: int,
    max_windows: int | None = None,
    batch_size: int = 8,
) -> Validation:
    """Return the mean loss over windows of `stream`, each predicted from its own start.

    max_windows   take that many, spread evenly; None takes all
    Outside autocast a ternary model's linears are computed exactly.
    """
    num_windows = (len(stream.tokens) - 1) // sequence_length
    count = min(max_windows or num_windows, num_windows)
    starts = torch.linspace(0, num_windows - 1, count).long() * sequence_length
    total, num_tokens = 0.0, 0
    for chunk in torch.split(starts, batch_size):
        window = stream.tokens[chunk[:, None] + torch.arange(sequence_length + 1)]
        targets = window[:, 1:]
        total += float(model.loss(window[:, :-1], targets)) * targets.numel()
        num_tokens += targets.numel()
    nats = total / num_tokens
    tokens_per_byte = len(stream.tokens) / stream.num_bytes
    return Validation(nats, nats * tokens_per_byte / math.log(2))


class _Clock:
    """Wall-clock minutes of a run, counted on from those of the part before."""

    def __init__(self, minutes_before: float) -> None:
        self._start = time.monotonic() - 60 * minutes_before

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60


def _autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _optimizer(model: LanguageModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": [weight], "decays": weight.dim() == 2} for weight in model.parameters()],
        betas=BETAS,
        fused=True,
    )


def _set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates.learning_rate
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


def _resumed(asked: RunRecord, found: RunRecord) -> RunRecord:
    same_budget = replace(found, token_budget=asked.token_budget, minute_budget=asked.minute_budget)
    if replace(same_budget, step=0, minutes=0.0, extended_at=()) != asked:
        raise ValueError(f"the run to resume was started as {found}, not as {asked}")
    if found.progress < 1 or same_budget.progress >= 1:
        return same_budget
    return replace(same_budget, extended_at=(*found.extended_at, found.num_tokens))


def _log(
    path: Path, record: RunRecord, training: float, validation: Validation, rates: Rates
) -> None:
    line = json.dumps(
        {
            "step": record.step,
            "tokens": record.num_tokens,
            "minutes": round(record.minutes, 2),
            "learning_rate": round(rates.learning_rate, 7),
            "training_nats_per_token": round(training, 4),
            "validation_nats_per_token": round(validation.nats_per_token, 4),
            "validation_bits_per_byte": round(validation.bits_per_byte, 4),
        }
    )
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")
