"""The model card of an exported run, written from its record and its loss curve alone."""

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwatt.model.card import SAME_TOKENS
from bitwatt.training.checkpoint import RunRecord
from bitwatt.training.data import WINDOW_LENGTHS
from bitwatt.training.model import SIZES, Architecture
from bitwatt.training.train import Validation

Line = dict[str, Any]
"""A line of `loss.jsonl` or `sweep.jsonl`."""

CURVE_ROWS = 12

_TITLES: dict[Architecture, str] = {
    "ternary": "bitwatt's embedded ternary model",
    "llama": "bitwatt's embedded 16-bit twin",
}
_TITLES_OF_OTHERS: dict[Architecture, str] = {
    "ternary": "A small ternary model, trained by bitwatt",
    "llama": "A small 16-bit model, trained by bitwatt",
    "binary": "A small model with binary weights, trained by bitwatt",
}
_DESCRIPTIONS: dict[Architecture, str] = {
    "ternary": (
        "A BitNet b1.58 language model in the shape of 2B4T: every linear layer has ternary "
        "weights (two bits each here, one float32 scale a tensor) and int8 activations, with "
        "norms before the output projections and a relu² gated MLP. Embeddings and norms are "
        "bfloat16."
    ),
    "llama": ("A LLaMA-style language model in bfloat16: plain linear layers and a SwiGLU MLP."),
    "binary": (
        "A BitNet language model whose linear layers have weights of −1 and 1, as the first BitNet "
        "had them (one float32 scale a tensor; two bits each here, as ternary ones), in the shape "
        "of BitNet b1.58 2B4T, with its int8 activations. Embeddings and norms are bfloat16."
    ),
}
_TWIN = (
    "It is the quality twin of the ternary model beside it: same sizes, same tokenizer, "
    f"{SAME_TOKENS}."
)
_PURPOSE = (
    "It has {millions:.1f}M parameters, and it exists so that the server answers on a fresh "
    "machine with no model hub. It is far too small, and too briefly trained, to be of use for "
    "anything but that."
)
_SIZE = "It has {millions:.1f}M parameters: far too few for anything but trying how training goes."
_DATA = (
    "Text: the sources of Python {python}'s standard library without its tests (Python Software "
    "Foundation licence), what `help()` tells of the modules written in C, and the language "
    "reference, without blocks of lines that repeat. A file in twenty, chosen by a hash of its "
    "name, is held out. Instructions: purpose, signature, module and members of the 1,000 "
    "best-known names in many phrasings, of which some are held out; sums, differences and "
    "products; words; short idioms; and what it doesn't know."
)
_VALIDATION_HEAD = (
    "| model | nats/token | bits/byte | answers, nats/token | tokens seen |\n|---|--:|--:|--:|--:|"
)
_MEASURED = (
    "Mean cross-entropy over all held-out text, and over the answers to held-out phrasings, in "
    "float32, of the weights as exported:"
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
    *,
    is_embedded: bool = True,
) -> str:
    """Return the README.md of the run of that architecture, in Markdown.

    runs       every run of the pair that is finished, to stand side by side
    hardware   what they were trained on, in general words
    sweep      one entry a short run made to choose the learning rate, as `sweep` writes them
    """
    run = runs[architecture]
    record = run.record
    description = _DESCRIPTIONS[architecture]
    if is_embedded and architecture == "llama":
        description = f"{description} {_TWIN}"
    purpose = _PURPOSE if is_embedded else _SIZE
    sections = [
        f"# {(_TITLES if is_embedded else _TITLES_OF_OTHERS)[architecture]}",
        description,
        purpose.format(millions=run.num_parameters / 1e6),
        "## Data",
        _DATA.format(python=platform.python_version()),
        "## Training",
        f"```\n{command(record)}\n```",
        _training_facts(record, hardware),
        _curve_table(run.curve),
        "The whole curve is in [loss.jsonl](loss.jsonl).",
        "## Validation",
        _MEASURED,
        _validation_table(runs),
    ]
    if sweep:
        sections += ["## Learning rates tried", _SWEEP, _sweep_table(sweep)]
    sections += ["## Limits", _limits(record, is_swept=bool(sweep))]
    return "\n\n".join(sections) + "\n"


def command(record: RunRecord) -> str:
    """Return the command that repeats the run on as many tokens.

    A shape that has no name among SIZES is left out.
    """
    shape = replace(record.config, architecture="ternary")
    size = "".join(f"--size {name} " for name, config in SIZES.items() if config == shape)
    return (
        f"python -m bitwatt.training train --arch {record.config.architecture} {size}"
        f"--out runs/{record.config.architecture} --tokens {record.num_tokens} "
        f"--text-tokens {record.text_tokens} --lr {record.learning_rate} "
        f"--batch-tokens {record.batch_tokens} --seed {record.seed}"
    )


def load_curve(path: Path) -> tuple[Line, ...]:
    """Return the lines of a `loss.jsonl` or a `sweep.jsonl`."""
    return tuple(json.loads(line) for line in path.read_text().splitlines())


def _training_facts(record: RunRecord, hardware: str) -> str:
    schedule = (
        "linear decay in two stages (halfway the rate is cut to two thirds and weight decay ends)"
        if record.config.architecture != "llama"
        else "linear decay, weight decay 0.1"
    )
    return (
        f"{record.num_tokens:,} tokens in {record.step:,} steps of {record.batch_tokens:,}, the "
        f"first {record.text_tokens:,} of text, the rest of instructions and a sixth of text, in "
        f"{record.minutes:.1f} minutes on {hardware}. Muon for the layers' matrices, AdamW "
        f"(0.9, 0.95) for the rest, gradient norm clipped at 1, learning rate "
        f"{record.learning_rate:g} after a warm-up of 2%, {schedule}; products in {record.dtype} "
        f"over float32 masters.{_extensions(record)}"
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
    names: dict[Architecture, str] = {
        "ternary": "ternary",
        "llama": "16-bit twin",
        "binary": "binary",
    }
    rows = [
        f"| {names[architecture]} | {run.validation.nats_per_token:.3f} "
        f"| {run.validation.bits_per_byte:.3f} "
        f"| {run.validation.answer_nats_per_token:.3f} | {run.record.num_tokens:,} |"
        for architecture, run in runs.items()
    ]
    return "\n".join([_VALIDATION_HEAD, *rows])


def _sweep_table(sweep: tuple[Line, ...]) -> str:
    rows = [
        f"| {entry['architecture']} | {entry['learning_rate']:g} | {entry['tokens']:,} "
        f"| {entry['validation_nats_per_token']:.3f} | {entry['answer_nats_per_token']:.3f} |"
        for entry in sweep
    ]
    head = (
        "| architecture | learning rate | tokens | text, nats/token | answers, nats/token |\n"
        "|---|--:|--:|--:|--:|"
    )
    return "\n".join([head, *rows])


def _limits(record: RunRecord, is_swept: bool) -> str:
    unswept = (
        ""
        if is_swept
        else "- Learning rates were not swept, so the comparison may favour either model.\n"
    )
    return (
        "- What it says about Python is often wrong, and it knows nothing else.\n"
        f"- It was trained on at most {WINDOW_LENGTHS[-1]} tokens at a time; the "
        f"{record.config.max_position} positions it accepts are more than it has seen.\n"
        "- A comparison of two models of this size and budget says little about larger ones.\n"
        f"{unswept}"
        "- It has had no safety training of any kind.\n"
        "- Another version of Python gives other tokens, and so another model."
    )
