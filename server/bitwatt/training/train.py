"""The training loop: a fixed order of batches until the budget is used."""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bitwatt.training.checkpoint import (
    LOSS_FILE,
    Dtype,
    RunRecord,
    load_model,
    load_optimizers,
    load_record,
    save_run,
)
from bitwatt.training.data import IGNORED, Batch, Curriculum, TrainingData, Windows
from bitwatt.training.loss import linear_cross_entropy
from bitwatt.training.model import LanguageModel
from bitwatt.training.optimizer import Optimizers
from bitwatt.training.schedule import Rates, rates_at

MAX_GRADIENT_NORM = 1.0
SECONDS_BETWEEN_CHECKPOINTS = 300
ROWS_TO_EVALUATE_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Validation:
    """The held-out losses: of text, by token and by byte, and of answers to held-out phrasings."""

    nats_per_token: float
    bits_per_byte: float
    answer_nats_per_token: float


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How a run reports and computes; none of it changes what is learned, but for rounding."""

    evaluate_every: int = 200
    validation_windows: int = 32
    use_compile: bool = True
    resume: bool = False


class Watch(Protocol):
    """Who follows a run; `is_stopped` is asked after each step, and ends the run resumably."""

    is_stopped: bool

    def stepped(self, record: RunRecord, loss: float) -> None:
        """Take a step's end: the record so far, and the step's loss in nats a token."""
        ...

    def evaluated(self, line: dict[str, Any]) -> None:
        """Take what `loss.jsonl` gets."""
        ...


class Printed:
    """A watch that prints each evaluation as a line of JSON."""

    def __init__(self) -> None:
        self.is_stopped = False

    def stepped(self, record: RunRecord, loss: float) -> None:
        pass

    def evaluated(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)


def train(
    record: RunRecord,
    data: TrainingData,
    folder: Path,
    options: LoopOptions,
    watch: Watch | None = None,
) -> RunRecord:
    """Train until the budget of `record` is used and return the record of what was done.

    `folder` gets the checkpoint and `loss.jsonl`, a line an evaluation. With `options.resume` the
    run that lies there goes on, and `record` must ask for the same but for the budget: a larger
    one extends a finished run, whose learning rate then rises again to what the schedule says.
    Raises ValueError if it asks for something else, or if neither budget is given.
    """
    watch = watch or Printed()
    if record.token_budget is None and record.minute_budget is None:
        raise ValueError("a run needs an end: a token budget or a minute budget")
    if options.resume:
        record = resumed(record, load_record(folder))
        model = load_model(folder)
    else:
        model = LanguageModel(record.config, seed=record.seed)
    curriculum = Curriculum(data, record.batch_tokens, record.text_tokens, record.seed)
    name = record.dtype or fastest_dtype(model, curriculum.at(0))
    record, dtype = replace(record, dtype=name), _DTYPES[name]
    optimizers = Optimizers(model, dtype)
    if options.resume:
        load_optimizers(folder, optimizers)
    if options.use_compile:
        for block in model.model.layers:  # all layers share what one of them compiles
            block.compile(dynamic=False)

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
    while record.progress < 1 and not watch.is_stopped:
        rates = rates_at(record.progress, record.config.architecture, record.learning_rate)
        optimizers.set_rates(rates)
        loss = loss_of(model, curriculum.at(record.step), dtype)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizers.step()
        recent += loss.detach()
        num_recent += 1
        record = replace(record, step=record.step + 1, minutes=clock.minutes)
        watch.stepped(record, float(loss.detach()))
        if record.step % options.evaluate_every == 0 or record.progress >= 1:
            validation = evaluate(model, data, dtype, options.validation_windows)
            line = _line(record, float(recent) / num_recent, validation, rates)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            watch.evaluated(line)
            recent, num_recent = torch.zeros(()), 0
        if (clock.minutes - saved_at) * 60 > SECONDS_BETWEEN_CHECKPOINTS:
            save_run(folder, record, model, optimizers)
            saved_at = clock.minutes
    save_run(folder, record, model, optimizers)
    return record


def loss_of(model: LanguageModel, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the mean loss over the positions that have a target, in nats a token.

    dtype   what matrices are multiplied in. In float32 a ternary model's linears are exact
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.hidden(batch.tokens, batch.positions).flatten(0, 1)
        targets = batch.targets.flatten()
        counted = (targets != IGNORED).nonzero().squeeze(1)
        return linear_cross_entropy(
            hidden.index_select(0, counted), model.model.embed_tokens.weight, targets[counted]
        )


def fastest_dtype(model: LanguageModel, batch: Batch) -> Dtype:
    """Return the dtype in which a step over `batch` takes less CPU time here.

    bfloat16 is 3 times as fast on a Zen 4, which multiplies it, and 20 times as slow on a Zen 3.
    """
    rows = slice(max(len(batch.tokens) // 8, 1))
    small = Batch(batch.tokens[rows], batch.positions[rows], batch.targets[rows])
    seconds: dict[Dtype, float] = {}
    for name, dtype in _DTYPES.items():
        for _ in range(2):  # the first makes the libraries choose their kernels
            start = time.process_time()
            torch.autograd.backward(loss_of(model, small, dtype))
            seconds[name] = time.process_time() - start
    model.zero_grad()
    return min(seconds, key=lambda name: seconds[name])


def evaluate(
    model: LanguageModel,
    data: TrainingData,
    dtype: torch.dtype = torch.float32,
    max_windows: int | None = None,
) -> Validation:
    """Return the losses over the held-out windows, each predicted from its own start.

    max_windows   of each length take that many, spread evenly; None takes all
    """
    text = _mean_loss(model, data.held_out_text, dtype, max_windows)
    answers = _mean_loss(model, data.held_out_answers, dtype, max_windows)
    return Validation(text, text * data.tokens_per_byte / math.log(2), answers)


@torch.no_grad()
def _mean_loss(
    model: LanguageModel, pool: tuple[Windows, ...], dtype: torch.dtype, max_windows: int | None
) -> float:
    total, num_tokens = 0.0, 0
    for windows in pool:
        num_windows = len(windows.tokens)
        count = min(max_windows or num_windows, num_windows)
        chosen = torch.linspace(0, num_windows - 1, count).long()
        for rows in torch.split(chosen, ROWS_TO_EVALUATE_AT_ONCE):
            batch = windows.batch(rows.numpy())
            counted = int((batch.targets != IGNORED).sum())
            with torch.compiler.set_stance("force_eager"):
                total += float(loss_of(model, batch, dtype)) * counted
            num_tokens += counted
    return total / num_tokens


_DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class _Clock:
    """Wall-clock minutes of a run, counted on from those of the part before."""

    def __init__(self, minutes_before: float) -> None:
        self._start = time.monotonic() - 60 * minutes_before

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60


def resumed(asked: RunRecord, found: RunRecord) -> RunRecord:
    """Return the record of the run that was found, with the budget that is asked for.

    Raises ValueError if anything else is asked for.
    """
    same_budget = replace(found, token_budget=asked.token_budget, minute_budget=asked.minute_budget)
    asked = replace(asked, dtype=asked.dtype or found.dtype)
    if replace(same_budget, step=0, minutes=0.0, extended_at=()) != asked:
        raise ValueError(f"the run to resume was started as {found}, not as {asked}")
    if found.progress < 1 or same_budget.progress >= 1:
        return same_budget
    return replace(same_budget, extended_at=(*found.extended_at, found.num_tokens))


def _line(
    record: RunRecord, training: float, validation: Validation, rates: Rates
) -> dict[str, Any]:
    return {
        "step": record.step,
        "tokens": record.num_tokens,
        "minutes": round(record.minutes, 2),
        "learning_rate": round(rates.learning_rate, 7),
        "training_nats_per_token": round(training, 4),
        "validation_nats_per_token": round(validation.nats_per_token, 4),
        "validation_bits_per_byte": round(validation.bits_per_byte, 4),
        "answer_nats_per_token": round(validation.answer_nats_per_token, 4),
    }
