"""From nothing to the embedded pair: material, runs, a sweep of learning rates, export, cards."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from tokenizers import Tokenizer

from bitwatt.training.card import FinishedRun, load_curve, model_card
from bitwatt.training.checkpoint import LOSS_FILE, RunRecord, load_model, load_record
from bitwatt.training.corpus import load_corpus
from bitwatt.training.data import TokenStream, tokenize
from bitwatt.training.export import export, round_as_exported
from bitwatt.training.model import Architecture
from bitwatt.training.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from bitwatt.training.train import LoopOptions, Validation, evaluate, train

SWEEP_FILE = "sweep.jsonl"
VALIDATION_FILE = "validation.json"
EXPORT_FOLDERS: dict[Architecture, str] = {"ternary": "ternary", "llama": "fp16"}


@dataclass(frozen=True, slots=True)
class Material:
    """What every run starts from, made anew from the standard library each time."""

    tokenizer: Tokenizer
    training: TokenStream
    held_out: TokenStream


def prepare() -> Material:
    """Return the tokenizer and both token streams; the version of Python decides them entirely."""
    corpus = load_corpus()
    texts = [document.text for document in corpus.train.documents]
    texts += [
        message.content
        for conversation in corpus.train.conversations
        for message in conversation.messages
    ]
    tokenizer = train_tokenizer(texts)
    return Material(
        tokenizer=tokenizer,
        training=tokenize(corpus.train, tokenizer),
        held_out=tokenize(corpus.held_out, tokenizer),
    )


def run(record: RunRecord, material: Material, folder: Path, loop: LoopOptions) -> None:
    """Train as `record` says; `folder` gets the checkpoint, the tokenizer and the curve."""
    save_tokenizer(material.tokenizer, folder)
    (folder / VALIDATION_FILE).unlink(missing_ok=True)  # until the run is finished again
    record = train(record, material.training, material.held_out, folder, loop)
    validation = validate(folder, material)
    (folder / VALIDATION_FILE).write_text(json.dumps(asdict(validation), indent=2) + "\n")
    print(f"{record.num_tokens} tokens in {record.minutes:.1f} minutes: {validation}", flush=True)


def validate(folder: Path, material: Material) -> Validation:
    """Return the loss over all held-out tokens, in float32, of the weights `export` would write."""
    model = load_model(folder)
    round_as_exported(model)
    return evaluate(model, material.held_out, load_record(folder).sequence_length)


def sweep(
    record: RunRecord,
    learning_rates: list[float],
    material: Material,
    runs: Path,
    loop: LoopOptions,
) -> None:
    """Run `record` at each learning rate and append the last losses to `runs`/sweep.jsonl."""
    architecture = record.config.architecture
    for learning_rate in learning_rates:
        folder = runs / f"sweep-{architecture}-{learning_rate:g}"
        tried = replace(record, learning_rate=learning_rate)
        train(tried, material.training, material.held_out, folder, loop)
        last = load_curve(folder / LOSS_FILE)[-1]
        entry = {
            "architecture": architecture,
            "learning_rate": learning_rate,
            "tokens": last["tokens"],
            "validation_nats_per_token": last["validation_nats_per_token"],
        }
        with (runs / SWEEP_FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def export_pair(runs: Path, out: Path, hardware: str) -> None:
    """Write every finished run under `runs` to `out`, in Hugging Face format and with its card.

    runs   a folder with the runs `ternary` and `llama`, or one of them, and maybe `sweep.jsonl`
    out    gets the folders `ternary` and `fp16`
    """
    finished: dict[Architecture, FinishedRun] = {}
    for architecture in get_args(Architecture):
        folder = runs / architecture
        if not (folder / VALIDATION_FILE).exists():
            continue
        model = load_model(folder)
        export(model, load_tokenizer(folder), out / EXPORT_FOLDERS[architecture])
        finished[architecture] = FinishedRun(
            record=load_record(folder),
            curve=load_curve(folder / LOSS_FILE),
            validation=Validation(**json.loads((folder / VALIDATION_FILE).read_text())),
            num_parameters=model.num_parameters(),
        )
    sweep_path = runs / SWEEP_FILE
    sweep_entries = load_curve(sweep_path) if sweep_path.exists() else ()
    for architecture in finished:
        folder = out / EXPORT_FOLDERS[architecture]
        card = model_card(architecture, finished, hardware, sweep_entries)
        (folder / "README.md").write_text(card)
        (folder / LOSS_FILE).write_text((runs / architecture / LOSS_FILE).read_text())
