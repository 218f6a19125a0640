"""The model card of an exported run, written from its record and its loss curve alone."""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwatt.training.checkpoint import RunRecord
from bitwatt.training.model import Architecture
from bitwatt.training.train import Validation

Line = dict[str, Any]
"""A line of `loss.jsonl` or `sweep.jsonl`."""

CURVE_ROWS = 12

_TITLES: dict[Architecture, str] = {
    "ternary": "bitwatt's embedded ternary model",
    "llama": "bitwatt's embedded 16-bit twin",
}
_DESCRIPTIONS: dict[Architecture, str] = {
    "ternary": (
        "A BitNet b1.58 language model in the shape of 2B4T: every linear layer has ternary "
        "weights (two bits each here, one float32 scale a tensor) and int8 activations, with "
        "norms before the output projections and a relu² gated MLP. Embeddings and norms are "
        "bfloat16."
    ),
    "llama": (
        "A LLaMA-style language model in bfloat16: plain linear layers and a SwiGLU MLP. It is the "
        "quality twin of the ternary model beside it: same sizes, same tokenizer, same tokens in "
        "the same order."
    ),
}
_PURPOSE = (
    "It has {millions:.1f}M parameters, and it exists so that the server answers on a fresh "
    "machine with no model hub. It is far too small, and too briefly trained, to be of use for "
    "anything but that."
)
_DATA = (
    "The sources of Python {python}'s standard library without its tests (Python Software "
    "Foundation licence), the language reference that `help()` shows, conversations made from the "
    "docstrings by templates, and a few hand-written greetings. A file in twenty, chosen by a hash "
    "of its name, is held out with all that is made from it."
)
_SWEEP = "Short runs of the same schedule, by the loss of a sample of the held-out windows:"


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a card tells of a run: its record, its curve, and the loss of the exported weights."""

    record: RunRecord
    curve: tuple[Line, ...]
    validation: Validation
    num_parameters: int


def model_card(
    architecture: Architecture,
    runs: dict[Architecture, FinishedRun],
    hardware: str,
    sweep: tuple[Line, ...] = (),
) -> str:
    """Return the README.md of the run of that architecture, in Markdown.

    runs       every run of the pair that is finished, to stand side by side
    hardware   what they were trained on, in general words
    sweep      one entry a short run made to choose the learning rate, as `sweep` writes them
    """
    run = runs[architecture]
    record = run.record
    sections = [
        f"# {_TITLES[architecture]}",
        _DESCRIPTIONS[architecture],
        _PURPOSE.format(millions=run.num_parameters / 1e6),
        "## Data",
        _DATA.format(python=platform.python_version()),
        "## Training",
        f"```\n{command(record)}\n```",
        _training_facts(record, hardware),
        _curve_table(run.curve),
        "The whole curve is in [loss.jsonl](loss.jsonl).",
        "## Validation",
        "Mean cross-entropy over all held-out tokens, in float32, of the weights as exported:",
        _validation_table(runs),
    ]
    if sweep:
        sections += ["## Learning rates tried", _SWEEP, _sweep_table(sweep)]
    sections += ["## Limits", _limits(record, is_swept=bool(sweep))]
    return "\n\n".join(sections) + "\n"


def command(record: RunRecord) -> str:
    """Return the command that repeats the run on as many tokens."""
    return (
        f"python -m bitwatt.training train --arch {record.config.architecture} "
        f"--out runs/{record.config.architecture} --tokens {record.num_tokens} "
        f"--lr {record.learning_rate} --batch-size {record.batch_size} "
        f"--sequence-length {record.sequence_length} --seed {record.seed}"
    )


def load_curve(path: Path) -> tuple[Line, ...]:
    """Return the lines of a `loss.jsonl` or a `sweep.jsonl`."""
    return tuple(json.loads(line) for line in path.read_text().splitlines())


def _training_facts(record: RunRecord, hardware: str) -> str:
    schedule = (
        "linear decay in two stages (halfway the rate is cut to two thirds and weight decay ends)"
        if record.config.architecture == "ternary"
        else "linear decay, weight decay 0.1"
    )
    return (
        f"{record.num_tokens:,} tokens in {record.step:,} steps of {record.batch_size} × "
        f"{record.sequence_length}, {record.minutes:.1f} minutes on {hardware}. AdamW "
        f"(0.9, 0.95), gradient norm clipped at 1, learning rate {record.learning_rate:g} after a "
        f"warm-up of 2%, {schedule}; bfloat16 autocast over float32 masters.{_extensions(record)}"
    )


def _extensions(record: RunRecord) -> str:
    if not record.extended_at:
        return ""
    points = " and ".join(f"{tokens:,}" for tokens in record.extended_at)
    return (
        f" The run had ended, its learning rate decayed, at {points} tokens, and was extended to "
        "the larger budget by `--resume`."
    )


def _curve_table(curve: tuple[Line, ...]) -> str:
    count = min(CURVE_ROWS, len(curve))
    chosen = sorted({round(i * (len(curve) - 1) / max(count - 1, 1)) for i in range(count)})
    rows = [
        f"| {line['tokens']:,} | {line['training_nats_per_token']:.3f} "
        f"| {line['validation_nats_per_token']:.3f} |"
        for line in (curve[index] for index in chosen)
    ]
    head = "| tokens | training, nats/token | validation sample, nats/token |\n|--:|--:|--:|"
    return "\n".join([head, *rows])


def _validation_table(runs: dict[Architecture, FinishedRun]) -> str:
    names: dict[Architecture, str] = {"ternary": "ternary", "llama": "16-bit twin"}
    rows = [
        f"| {names[architecture]} | {run.validation.nats_per_token:.3f} "
        f"| {run.validation.bits_per_byte:.3f} | {run.record.num_tokens:,} |"
        for architecture, run in runs.items()
    ]
    return "\n".join(["| model | nats/token | bits/byte | tokens seen |\n|---|--:|--:|--:|", *rows])


def _sweep_table(sweep: tuple[Line, ...]) -> str:
    rows = [
        f"| {entry['architecture']} | {entry['learning_rate']:g} | {entry['tokens']:,} "
        f"| {entry['validation_nats_per_token']:.3f} |"
        for entry in sweep
    ]
    head = "| architecture | learning rate | tokens | validation, nats/token |\n|---|--:|--:|--:|"
    return "\n".join([head, *rows])


def _limits(record: RunRecord, is_swept: bool) -> str:
    unswept = (
        ""
        if is_swept
        else "- Learning rates were not swept, so the comparison may favour either model.\n"
    )
    return (
        "- What it says about Python is often wrong, and it knows nothing else.\n"
        f"- It was trained on {record.sequence_length} tokens at a time; the "
        f"{record.config.max_position} positions it accepts are more than it has seen.\n"
        "- A comparison of two models of this size and budget says little about larger ones.\n"
        f"{unswept}"
        "- It has had no safety training of any kind.\n"
        "- Another version of Python gives other tokens, and so another model."
    )
