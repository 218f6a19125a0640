"""`python -m bitwatt.training`: train one model or several, try learning rates, export.

Ctrl-C ends a run after its step, and --resume goes on with it.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from bitwatt.builtin import TERNARY
from bitwatt.evaluation.completions import save_prompts
from bitwatt.evaluation.names import save_names
from bitwatt.training.checkpoint import RUN_FILE, Dtype, RunRecord
from bitwatt.training.model import DEFAULT_LEARNING_RATES, DEFAULT_SIZE, SIZES, Architecture
from bitwatt.training.names import choose_names
from bitwatt.training.pipeline import Material, export_pair, prepare, run, sweep
from bitwatt.training.progress import ended_by_ctrl_c
from bitwatt.training.prompts import choose_prompts
from bitwatt.training.sizes import save_table, sizes_as_markdown, sizes_table, train_sizes
from bitwatt.training.train import LoopOptions, Printed, Watch

_EPILOG = """\
examples:
  train both models on 20 million tokens and replace the embedded pair
    python -m bitwatt.training pair --tokens 20e6
  the same after an interruption, or with more tokens to extend a finished pair
    python -m bitwatt.training pair --tokens 20e6 --resume
  the ternary model alone for half an hour
    python -m bitwatt.training train --arch ternary --out runs/ternary --minutes 30
  the gap between both at three sizes, and the first BitNet's at one of them
    python -m bitwatt.training sizes --tokens 5e6 --resume
    python -m bitwatt.training sizes --tokens 5e6 --resume --sizes 6M --arch binary
  short runs at three learning rates
    python -m bitwatt.training sweep --arch llama --tokens 5e5 --lrs 4e-3 8e-3 1.6e-2
"""

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it
_LEARNING_RATES_TOLD = "peak learning rate (default: " + (
    ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LEARNING_RATES.items()) + ")"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bitwatt.training",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    budget = _run_flags()

    one = commands.add_parser("train", parents=[budget], help="train one model")
    one.add_argument("--arch", choices=get_args(Architecture), required=True)
    _add_size(one)
    one.add_argument("--out", type=Path, required=True, help="folder of the run")
    one.add_argument("--lr", type=float, help=_LEARNING_RATES_TOLD)
    one.add_argument("--resume", action="store_true", help="go on with the run in --out, if any")

    several = commands.add_parser("sweep", parents=[budget], help="try several learning rates")
    several.add_argument("--arch", choices=get_args(Architecture), required=True)
    _add_size(several)
    several.add_argument("--lrs", type=float, nargs="+", required=True)
    several.add_argument("--runs", type=Path, default=Path("runs"), help="gets sweep.jsonl")
    several.add_argument("--resume", action="store_true", help="go on with runs that were begun")

    sizes = commands.add_parser("sizes", parents=[budget], help="compare at several sizes")
    sizes.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    sizes.add_argument(
        "--arch", choices=get_args(Architecture), nargs="+", default=["ternary", "llama"]
    )
    sizes.add_argument("--runs", type=Path, default=Path("runs"), help="gets sizes.json")
    _add_learning_rates(sizes)
    sizes.add_argument("--resume", action="store_true", help="go on with the runs under --runs")

    pair = commands.add_parser("pair", parents=[budget], help="train both models and export them")
    _add_size(pair)
    _add_learning_rates(pair)
    pair.add_argument("--resume", action="store_true", help="go on with the runs under --runs")
    _add_export_flags(pair)

    _add_export_flags(commands.add_parser("export", help="write finished runs as checkpoints"))
    commands.add_parser("names", help="write the evaluation's names and beginnings anew")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "names":
        save_names(choose_names())
        save_prompts(choose_prompts())
        return
    if options.command == "export":
        export_pair(options.runs, options.out, options.hardware)
        return
    if options.tokens is None and options.minutes is None:
        parser.error("a run needs an end: --tokens or --minutes")
    if options.threads:
        torch.set_num_threads(options.threads)
    material = prepare()
    loop = LoopOptions(
        evaluate_every=options.evaluate_every,
        use_compile=not options.no_compile,
        resume=getattr(options, "resume", False),
    )
    watch = Printed()
    with ended_by_ctrl_c(watch):
        _train(options, material, loop, watch)
    if watch.is_stopped:
        sys.exit(_INTERRUPTED)


def _train(
    options: argparse.Namespace, material: Material, loop: LoopOptions, watch: Watch
) -> None:
    if options.command == "train":
        learning_rate = options.lr or DEFAULT_LEARNING_RATES[options.arch]
        is_there = options.resume and (options.out / RUN_FILE).exists()
        record = _record(options, options.arch, learning_rate)
        run(record, material, options.out, replace(loop, resume=is_there), watch)
        return
    if options.command == "sweep":
        record = _record(options, options.arch, options.lrs[0])
        sweep(record, options.lrs, material, options.runs, loop, watch)
        return
    rates: dict[Architecture, float] = {
        "ternary": options.ternary_lr,
        "llama": options.llama_lr,
    }
    if options.command == "sizes":
        rates["binary"] = options.ternary_lr
        rates = {architecture: rates[architecture] for architecture in options.arch}
        record = _record(options, "ternary", options.ternary_lr)
        train_sizes(record, options.sizes, rates, material, options.runs, loop, watch)
        rows = sizes_table(options.runs)
        save_table(rows, options.runs)
        print(sizes_as_markdown(rows))
        return
    for architecture, learning_rate in rates.items():
        folder = options.runs / architecture
        resume = options.resume and (folder / RUN_FILE).exists()
        record = _record(options, architecture, learning_rate)
        run(record, material, folder, replace(loop, resume=resume), watch)
        if watch.is_stopped:
            return
    export_pair(options.runs, options.out, options.hardware)


def _run_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--tokens", type=float, help="end after so many training tokens")
    flags.add_argument("--minutes", type=float, help="end after so many minutes of training")
    flags.add_argument(
        "--text-tokens", type=float, default=3e6, help="of them, the text phase's (default: 3e6)"
    )
    flags.add_argument("--batch-tokens", type=int, default=4096, help="a step's (default: 4096)")
    flags.add_argument(
        "--dtype", choices=get_args(Dtype), help="of matrix products (default: the faster here)"
    )
    flags.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    flags.add_argument("--evaluate-every", type=int, default=200, help="steps (default: 200)")
    flags.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    flags.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return flags


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=SIZES, default=DEFAULT_SIZE, help="about how many parameters"
    )


def _add_learning_rates(parser: argparse.ArgumentParser) -> None:
    for architecture in ("ternary", "llama"):
        rate = DEFAULT_LEARNING_RATES[architecture]
        parser.add_argument(f"--{architecture}-lr", type=float, default=rate)


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=TERNARY.parent,
        help="gets ternary/ and fp16/ (default: the built-in)",
    )
    parser.add_argument(
        "--hardware",
        default=f"{os.cpu_count()} CPU cores",
        help="what the card says the runs ran on (default: %(default)s)",
    )


def _record(
    options: argparse.Namespace, architecture: Architecture, learning_rate: float
) -> RunRecord:
    return RunRecord(
        config=replace(SIZES[getattr(options, "size", DEFAULT_SIZE)], architecture=architecture),
        seed=options.seed,
        learning_rate=learning_rate,
        batch_tokens=options.batch_tokens,
        text_tokens=int(options.text_tokens),
        token_budget=int(options.tokens) if options.tokens else None,
        minute_budget=options.minutes,
        dtype=options.dtype,
    )


if __name__ == "__main__":
    main()
