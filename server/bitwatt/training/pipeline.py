"""From nothing to the embedded pair: material, runs, a sweep of learning rates, export, cards."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from bitwatt.evaluation.questions import held_out_questions
from bitwatt.training.card import FinishedRun, load_curve, model_card
from bitwatt.training.checkpoint import LOSS_FILE, RUN_FILE, RunRecord, load_model, load_record
from bitwatt.training.conversations import Conversation, Message, conversations
from bitwatt.training.corpus import load_corpus
from bitwatt.training.curve import save_csv, save_png
from bitwatt.training.data import TrainingData, encode_conversation, encode_text, pack
from bitwatt.training.export import export, round_as_exported
from bitwatt.training.model import Architecture
from bitwatt.training.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from bitwatt.training.train import LoopOptions, Validation, Watch, evaluate, resumed, train

SWEEP_FILE = "sweep.jsonl"
VALIDATION_FILE = "validation.json"
EXPORT_FOLDERS: dict[Architecture, str] = {"ternary": "ternary", "llama": "fp16"}


@dataclass(frozen=True, slots=True)
class Material:
    """What every run starts from, made anew from the standard library each time."""

    tokenizer: Tokenizer
    data: TrainingData


def prepare() -> Material:
    """Return the tokenizer and all windows; the version of Python decides them entirely."""
    corpus = load_corpus()
    taught = conversations()
    texts = [document.text for document in corpus.train]
    texts += [message.content for conversation in taught for message in conversation.messages]
    tokenizer = train_tokenizer(texts)
    held_out = [encode_text(document.text, tokenizer) for document in corpus.held_out]
    num_bytes = sum(len(document.text.encode()) for document in corpus.held_out)
    asked = [
        Conversation((Message("user", question.text), Message("assistant", question.answer)))
        for question in held_out_questions()
    ]
    data = TrainingData(
        text=pack(encode_text(document.text, tokenizer) for document in corpus.train),
        instructions=pack(encode_conversation(talk, tokenizer) for talk in taught),
        held_out_text=pack(held_out),
        held_out_answers=pack(encode_conversation(talk, tokenizer) for talk in asked),
        tokens_per_byte=sum(len(document.tokens) for document in held_out) / num_bytes,
    )
    return Material(tokenizer, data)


def run(
    record: RunRecord,
    material: Material,
    folder: Path,
    loop: LoopOptions,
    watch: Watch | None = None,
) -> RunRecord:
    """Train as `record` says, and return it as far as the run came.

    folder   gets the checkpoint, the tokenizer and the curve, and the loss of a finished run. With
             `loop.resume` a run there that is finished is left as it is
    """
    if loop.resume and (folder / VALIDATION_FILE).exists():
        found = resumed(record, load_record(folder))
        if found.progress >= 1:
            return found
    save_tokenizer(material.tokenizer, folder)
    (folder / VALIDATION_FILE).unlink(missing_ok=True)  # until the run is finished again
    record = train(record, material.data, folder, loop, watch)
    if record.progress < 1:
        return record
    validation = validate(folder, material)
    (folder / VALIDATION_FILE).write_text(json.dumps(asdict(validation), indent=2) + "\n")
    return record


def validate(folder: Path, material: Material) -> Validation:
    """Return the loss over all held-out tokens, in float32, of the weights `export` would write."""
    model = load_model(folder)
    round_as_exported(model)
    return evaluate(model, material.data)


def sweep(
    record: RunRecord,
    learning_rates: list[float],
    material: Material,
    runs: Path,
    loop: LoopOptions,
    watch: Watch | None = None,
) -> None:
    """Run `record` at each learning rate and append the last losses to `runs`/sweep.jsonl.

    With `loop.resume` a run that was begun goes on, and one that is done isn't repeated.
    """
    architecture = record.config.architecture
    for learning_rate in learning_rates:
        folder = runs / f"sweep-{architecture}-{learning_rate:g}"
        tried = replace(record, learning_rate=learning_rate)
        is_there = loop.resume and (folder / RUN_FILE).exists()
        done = train(tried, material.data, folder, replace(loop, resume=is_there), watch)
        if done.progress < 1:
            return
        last = load_curve(folder / LOSS_FILE)[-1]
        entry = {
            "architecture": architecture,
            "learning_rate": learning_rate,
            "tokens": last["tokens"],
            "validation_nats_per_token": last["validation_nats_per_token"],
            "answer_nats_per_token": last["answer_nats_per_token"],
        }
        with (runs / SWEEP_FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def export_pair(runs: Path, out: Path, hardware: str) -> None:
    """Write every finished run under `runs` to `out`, in Hugging Face format and with its card.

    runs   a folder with the runs `ternary` and `llama`, or one of them, and maybe `sweep.jsonl`
    out    gets the folders `ternary` and `fp16`
    """
    finished: dict[Architecture, FinishedRun] = {}
    for architecture, name in EXPORT_FOLDERS.items():
        folder = runs / architecture
        if (folder / VALIDATION_FILE).exists():
            finished[architecture] = _exported(folder, out / name)
    sweep_path = runs / SWEEP_FILE
    sweep_entries = load_curve(sweep_path) if sweep_path.exists() else ()
    for architecture in finished:
        folder = out / EXPORT_FOLDERS[architecture]
        card = model_card(architecture, finished, hardware, sweep_entries)
        (folder / "README.md").write_text(card)
        (folder / LOSS_FILE).write_text((runs / architecture / LOSS_FILE).read_text())


def export_run(folder: Path, out: Path, hardware: str) -> None:
    """Write the finished run in `folder` to `out`, in Hugging Face format and with its card.

    `folder` also gets its curve as `curve.csv`, and as `curve.png` where matplotlib is.
    """
    finished = _exported(folder, out)
    architecture = finished.record.config.architecture
    card = model_card(architecture, {architecture: finished}, hardware, is_embedded=False)
    (out / "README.md").write_text(card)
    (out / LOSS_FILE).write_text((folder / LOSS_FILE).read_text())
    save_csv(finished.curve, folder / "curve.csv")
    save_png(finished.curve, folder / "curve.png")


def _exported(folder: Path, out: Path) -> FinishedRun:
    model = load_model(folder)
    export(model, load_tokenizer(folder), out)
    return FinishedRun(
        record=load_record(folder),
        curve=load_curve(folder / LOSS_FILE),
        validation=Validation(**json.loads((folder / VALIDATION_FILE).read_text())),
        num_parameters=model.num_parameters(),
    )
