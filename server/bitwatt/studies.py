"""The commands that train and measure models without a server: train, eval and paper."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from bitwatt import builtin
from bitwatt.errors import BitwattError
from bitwatt.hub import fetch
from bitwatt.knobs import Settings, Shown
from bitwatt.quantities import read_count
from bitwatt.settings import check_source

__all__ = [
    "EvalSettings",
    "PaperSettings",
    "TrainSettings",
    "run_eval",
    "run_paper",
    "run_train",
]

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it


_Count = Annotated[int, BeforeValidator(read_count), Shown("TOKENS")]


class TrainSettings(Settings):
    """Train a small model on Python's standard library, and write it as a folder to serve.

    Ctrl-C ends a run after its step, and --resume goes on with it; what it learns is the same.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_TRAIN_", cli_prog_name="bitwatt train")

    groups: ClassVar[dict[str, str]] = {"arch": "Model", "tokens": "Run", "num_threads": "Machine"}

    out: CliPositionalArg[Path] = Field(
        description="Folder of the run: checkpoint, curve, and model/, which can be served"
    )
    arch: Literal["ternary", "llama", "binary"] = Field(
        "ternary", description="BitNet b1.58, its 16-bit twin, or the first BitNet's binary weights"
    )
    size: Literal["2M", "6M", "13M"] = Field("13M", description="About how many parameters")
    seed: Annotated[int, Shown("NUMBER")] = Field(0, description="Seed of weights and order")
    tokens: Annotated[_Count | None, Shown("TOKENS", "--minutes ends it")] = Field(
        None, ge=1, description="Tokens to train on, of text and then of instructions"
    )
    minutes: Annotated[float | None, Shown("MINUTES", "--tokens ends it")] = Field(
        None, gt=0, description="Minutes to train for"
    )
    text_tokens: _Count = Field(3_000_000, ge=0, description="Tokens of the text phase")
    batch_tokens: _Count = Field(4096, ge=256, description="Tokens of a step")
    lr: Annotated[float | None, Shown("RATE", "1.6e-2, of llama 8e-3")] = Field(
        None, gt=0, lt=1, description="Peak learning rate"
    )
    evaluate_every: Annotated[int, Shown("STEPS")] = Field(
        200, ge=1, description="Steps from an evaluation to the next"
    )
    resume: bool = Field(False, description="Go on with the run in the folder, if there is one")
    num_threads: Annotated[int | None, Shown("THREADS", "PyTorch's own number")] = Field(
        None, ge=1, le=1024, description="CPU threads"
    )
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, Shown("{bfloat16,float32}", "the faster here")
    ] = Field(None, description="Type that matrices are multiplied in")
    compile: bool = Field(True, description="Compile the layers with torch.compile")

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.tokens is None and self.minutes is None:
            raise ValueError("a run needs an end: --tokens or --minutes")
        return self


def run_train(settings: TrainSettings) -> int:
    """Train, export, and say how to go on; return the exit status."""
    import torch

    from bitwatt.training.checkpoint import RUN_FILE, RunRecord
    from bitwatt.training.model import DEFAULT_LEARNING_RATES, SIZES
    from bitwatt.training.pipeline import export_run, prepare, run
    from bitwatt.training.progress import Progress, ended_by_ctrl_c
    from bitwatt.training.train import LoopOptions

    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    record = RunRecord(
        config=replace(SIZES[settings.size], architecture=settings.arch),
        seed=settings.seed,
        learning_rate=settings.lr or DEFAULT_LEARNING_RATES[settings.arch],
        batch_tokens=settings.batch_tokens,
        text_tokens=settings.text_tokens,
        token_budget=settings.tokens,
        minute_budget=settings.minutes,
        dtype=settings.dtype,
    )
    folder = settings.out
    has_run = (folder / RUN_FILE).exists()
    if has_run and not settings.resume:
        print(f"bitwatt train: {folder} has a run; go on with --resume", file=sys.stderr)
        return 1
    loop = LoopOptions(
        evaluate_every=settings.evaluate_every, use_compile=settings.compile, resume=has_run
    )
    progress = Progress(sys.stderr)
    try:
        print("reading the standard library …", file=sys.stderr, flush=True)
        material = prepare()
        try:
            with ended_by_ctrl_c(progress):
                record = run(record, material, folder, loop, progress)
        finally:
            progress.clear()
        if record.progress < 1:
            print(f"stopped at {record.num_tokens:,} tokens; go on with --resume", file=sys.stderr)
            return _INTERRUPTED
        export_run(folder, folder / "model", f"{os.cpu_count()} CPU cores")
    except (ValueError, OSError) as error:
        print(f"bitwatt train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    pictured = "curve.csv and curve.png" if (folder / "curve.png").exists() else "curve.csv"
    print(f"bitwatt serve {folder / 'model'}    its curve: {pictured} in {folder}")
    return 0


class EvalSettings(Settings):
    """Measure a model: perplexity, held-out questions, agreement of backends, memory and speed.

    A ternary model is also measured with its weights in 16 bits, which leaves its activations
    unquantized, with a KV cache in int8, and beside its twin. The table is printed as Markdown.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_EVAL_", cli_prog_name="bitwatt eval")

    groups: ClassVar[dict[str, str]] = {
        "twin": "Models",
        "text": "Work",
        "json_path": "Output",
    }

    path: Annotated[
        CliPositionalArg[str | None],
        BeforeValidator(check_source),
        Shown("PATH", "the embedded pair"),
    ] = Field(
        None,
        description="A model's folder, as on Hugging Face, or a .gguf file; or "
        "ORG/NAME[:FILE][@REVISION] of its hub, where there is no such path",
    )
    twin: Annotated[
        str | None,
        BeforeValidator(check_source),
        Shown("PATH", "the embedded pair's, without a PATH"),
    ] = Field(None, description="A 16-bit model trained on the same data, named in the same way")
    text: Annotated[Path | None, Shown("FILE", "files held out of the standard library")] = Field(
        None, description="Text for perplexity, or .jsonl with text"
    )
    window: Annotated[int, Shown("TOKENS")] = Field(
        256, ge=2, le=1 << 20, description="Tokens of a window"
    )
    every: Annotated[int, Shown("TASKS")] = Field(
        1,
        ge=1,
        le=100,
        description="Take one text and one question of so many, and time one run, for a quick look",
    )
    num_threads: Annotated[int | None, Shown("THREADS", "all processors'")] = Field(
        None, ge=1, le=1024, description="CPU threads of a model"
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the table to, as JSON"
    )
    markdown: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to write the table to, as Markdown"
    )
    save_text: Annotated[Path | None, Shown("FILE")] = Field(
        None,
        description="File to write the texts to, as .jsonl with text, for other evaluations",
    )


def run_eval(settings: EvalSettings) -> int:
    """Measure, print the table, write what was asked for; return the exit status."""
    from bitwatt.evaluation.report import Work, as_markdown, evaluate

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        path = builtin.TERNARY if settings.path is None else fetch(settings.path)
        twin = None if settings.twin is None else fetch(settings.twin)
        if settings.path is None and twin is None and builtin.FP16.is_dir():
            twin = builtin.FP16
        texts = _texts(settings.text)[:: settings.every]
        if settings.save_text is not None:
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            settings.save_text.write_text("".join(lines), encoding="utf-8")
        work = Work(
            texts=texts,
            window_tokens=settings.window,
            every=settings.every,
            num_threads=settings.num_threads,
        )
        tables = evaluate(path, twin, work, report)
        _write(tables, as_markdown(tables), settings.json_path, settings.markdown)
    except (BitwattError, ValueError, OSError) as error:
        print(f"bitwatt eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _texts(path: Path | None) -> list[str]:
    """Return the texts, each with a character at least. Raises ValueError for a file of none."""
    if path is None:
        from bitwatt.training.corpus import load_corpus

        return [document.text for document in load_corpus().held_out]
    written = path.read_text(encoding="utf-8")
    texts = [written]
    if path.suffix == ".jsonl":
        try:
            texts = [json.loads(line)["text"] for line in written.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}: each line is an object with "text"') from error
    if not any(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} has no text")
    return [text for text in texts if text]


class PaperSettings(Settings):
    """Rerun the paper's tables of memory, latency, throughput and energy on this machine's CPU.

    Models have random weights in the paper's shapes. The table is printed as Markdown.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_PAPER_", cli_prog_name="bitwatt paper")

    groups: ClassVar[dict[str, str]] = {"quick": "Work", "json_path": "Output"}

    quick: bool = Field(
        False,
        description="Run as many layers as some eight minutes allow, and extrapolate; else as many "
        "as memory holds",
    )
    num_threads: Annotated[int | None, Shown("THREADS", "all processors'")] = Field(
        None, ge=1, le=1024, description="CPU threads of a model"
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the tables to, as JSON"
    )
    markdown: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to write the tables to, as Markdown"
    )


def run_paper(settings: PaperSettings) -> int:
    """Measure, print the tables, write what was asked for; return the exit status."""
    from bitwatt.bench.paper import QUICK, Effort, bench_paper
    from bitwatt.bench.paper_report import paper_as_markdown

    effort = replace(QUICK if settings.quick else Effort(), num_threads=settings.num_threads)
    started = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {line}", file=sys.stderr, flush=True)

    try:
        tables = bench_paper(effort, report=report)
        _write(tables, paper_as_markdown(tables), settings.json_path, settings.markdown)
    except (RuntimeError, OSError) as error:
        print(f"bitwatt paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _write(
    tables: dict[str, Any], markdown: str, json_path: Path | None, markdown_path: Path | None
) -> None:
    print(markdown)
    if json_path is not None:
        json_path.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
    if markdown_path is not None:
        markdown_path.write_text(markdown, encoding="utf-8")
