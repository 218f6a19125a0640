"""`python -m bitwatt.training`: train one model, try learning rates, export, or do it all."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from bitwatt.builtin import TERNARY
from bitwatt.training.checkpoint import RUN_FILE, RunRecord
from bitwatt.training.model import Architecture, ModelConfig
from bitwatt.training.pipeline import export_pair, prepare, run, sweep
from bitwatt.training.train import LoopOptions

_EPILOG = """\
examples:
  train both models on 20 million tokens and replace the embedded pair
    python -m bitwatt.training pair --tokens 20e6
  the same after an interruption, or with more tokens to extend a finished pair
    python -m bitwatt.training pair --tokens 20e6 --resume
  the ternary model alone for half an hour
    python -m bitwatt.training train --arch ternary --out runs/ternary --minutes 30
  short runs at three learning rates
    python -m bitwatt.training sweep --arch llama --tokens 5e5 --lrs 5e-4 1e-3 2e-3
"""
_DEFAULT_LEARNING_RATES: dict[str, float] = {"ternary": 2e-3, "llama": 1e-3}


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
    one.add_argument("--out", type=Path, required=True, help="folder of the run")
    one.add_argument("--lr", type=float, help="peak learning rate (default: 2e-3, LLaMA 1e-3)")
    one.add_argument("--resume", action="store_true", help="go on with the run that lies in --out")

    several = commands.add_parser("sweep", parents=[budget], help="try several learning rates")
    several.add_argument("--arch", choices=get_args(Architecture), required=True)
    several.add_argument("--lrs", type=float, nargs="+", required=True)
    several.add_argument("--runs", type=Path, default=Path("runs"), help="gets sweep.jsonl")

    pair = commands.add_parser("pair", parents=[budget], help="train both models and export them")
    pair.add_argument("--ternary-lr", type=float, default=_DEFAULT_LEARNING_RATES["ternary"])
    pair.add_argument("--llama-lr", type=float, default=_DEFAULT_LEARNING_RATES["llama"])
    pair.add_argument("--resume", action="store_true", help="go on with the runs under --runs")
    _add_export_flags(pair)

    _add_export_flags(commands.add_parser("export", help="write finished runs as checkpoints"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
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
    if options.command == "train":
        learning_rate = options.lr or _DEFAULT_LEARNING_RATES[options.arch]
        run(_record(options, options.arch, learning_rate), material, options.out, loop)
    elif options.command == "sweep":
        record = _record(options, options.arch, options.lrs[0])
        sweep(record, options.lrs, material, options.runs, loop)
    else:
        rates: dict[Architecture, float] = {
            "ternary": options.ternary_lr,
            "llama": options.llama_lr,
        }
        for architecture, learning_rate in rates.items():
            folder = options.runs / architecture
            resume = options.resume and (folder / RUN_FILE).exists()
            record = _record(options, architecture, learning_rate)
            run(record, material, folder, replace(loop, resume=resume))
        export_pair(options.runs, options.out, options.hardware)


def _run_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--tokens", type=float, help="end after so many training tokens")
    flags.add_argument("--minutes", type=float, help="end after so many minutes of training")
    flags.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: 8)")
    flags.add_argument("--sequence-length", type=int, default=256, help="tokens (default: 256)")
    flags.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    flags.add_argument("--evaluate-every", type=int, default=100, help="steps (default: 100)")
    flags.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    flags.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return flags


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
        config=ModelConfig(architecture),
        seed=options.seed,
        learning_rate=learning_rate,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        token_budget=int(options.tokens) if options.tokens else None,
        minute_budget=options.minutes,
    )


if __name__ == "__main__":
    main()
