"""Everything that wants a GPU, in one go: whole models, serving, tests, kernels; one JSON, one log.

    make gpu ARGS="--output DIR"

and, where there is no make,

    PYTHONPATH=server:kernels:clients/python python3 -m bitwatt.bench.gpu --output DIR

Runs in a checkout, with kernels/ on the path for its package bench. Needs Python 3.11 or later with
torch 2.11, triton 3.6, numpy, nvidia-ml-py and pytest, or later ones, and no more than a GPU image
carries. The first figure comes first, each stage is a process with a deadline of its own, and DIR
has every row from the moment it was measured. --rehearse runs every stage on tiny shapes in
Triton's interpreter, without a GPU: its figures mean nothing, but its code has run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.report import headline, tables

from bitwatt.bench.gpu_results import NO_GPU, REPOSITORY, Results

__all__ = ["BUDGET_S", "EXTRA_STAGES", "REHEARSAL_STAGES", "STAGES", "Stage", "main", "run_stages"]

RESULTS = REPOSITORY / "kernels/bench/results"
STAGE_COMMAND = (sys.executable, "-m", "bitwatt.bench.gpu_stages")
BUDGET_S = 540.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One process.

    function    and its arguments: of bitwatt.bench.gpu_stages
    estimate_s  seconds on an H100 with no kernel compiled yet, by estimate: nothing was measured
    deadline_s  after so many it is killed
    """

    name: str
    function: str
    arguments: tuple[str, ...]
    estimate_s: float
    deadline_s: float


STAGES = (
    Stage("rates", "rates", (), 12, 60),
    Stage("2B4T headline", "headline", ("2B4T",), 50, 120),
    Stage("2B4T serving", "serving", ("2B4T",), 65, 120),
    Stage("tests", "tests", (), 100, 120),
    Stage("2B4T ternary", "model", ("2B4T", "ternary"), 45, 90),
    Stage("2B4T dense", "model", ("2B4T", "dense"), 35, 90),
    Stage("2B4T layer ops", "layer_ops", ("2B4T",), 25, 60),
    Stage("2B4T pdl", "pdl", ("2B4T",), 45, 90),
    Stage("matmuls", "matmuls", ("2B4T", "8192²"), 75, 120),
    Stage("2B4T persistent step", "persistent", ("2B4T",), 60, 120),
)
"""What fits the budget, those that answer most first."""

EXTRA_STAGES = (
    Stage("7B ternary", "whole_model", ("7B", "ternary"), 60, 120),
    Stage("7B dense", "whole_model", ("7B", "dense"), 50, 120),
    Stage("3B ternary", "whole_model", ("3B", "ternary"), 50, 120),
    Stage("3B dense", "whole_model", ("3B", "dense"), 35, 120),
    Stage("matmuls of large models", "matmuls", ("3B", "7B", "70B"), 150, 240),
)
"""Run with --all, behind the others."""

REHEARSAL_STAGES = (
    Stage("rates", "rates", (), 5, 120),
    Stage("headline", "headline", ("rehearsal",), 5, 120),
    Stage("serving", "serving", ("rehearsal",), 20, 300),
    Stage("tests", "tests", (), 20, 300),
    Stage("ternary", "model", ("rehearsal", "ternary"), 5, 120),
    Stage("dense", "model", ("rehearsal", "dense"), 5, 120),
    Stage("layer ops", "layer_ops", ("rehearsal",), 5, 120),
    Stage("pdl", "pdl", ("rehearsal",), 5, 120),
    Stage("matmuls", "matmuls", ("rehearsal",), 5, 120),
    Stage("persistent step", "persistent", ("rehearsal",), 5, 120),
)


def run_stages(
    stages: Sequence[Stage], output: Path, *, budget_s: float, is_rehearsal: bool
) -> tuple[Results, bool]:
    """Run the stages one after the other; return what they measured, and whether there is a GPU.

    Stops at the first stage if there is none. What fails, hangs or finds no time is named in
    "skipped", and what it has measured till then stays.

    output  the JSON; the log of all stages lies beside it
    """
    end = time.monotonic() + budget_s
    Results(output).put(kind="bitwatt gpu bench", is_rehearsal=is_rehearsal, skipped={})
    with output.with_suffix(".log").open("w") as log:
        for stage in stages:
            started = time.monotonic()
            if started >= end:
                Results(output).skip(stage.name, f"out of time: --budget-s is {budget_s:g}")
                continue
            print(f"{stage.name} …", file=sys.stderr, flush=True)
            print(f"== {stage.name}", file=log, flush=True)
            begin = log.tell()
            timeout = min(stage.deadline_s, end - started)
            status = _run(stage, output, log.fileno(), timeout, is_rehearsal=is_rehearsal)
            results = Results(output)
            took = round(time.monotonic() - started, 1)
            results.put(stage_s=results.data.get("stage_s", {}) | {stage.name: took})
            told = output.with_suffix(".log").read_bytes()[begin:].decode(errors="replace")
            if status == NO_GPU and stage is stages[0]:
                print(told.strip(), file=sys.stderr)
                return results, False
            if status is None:
                results.skip(stage.name, f"killed after {timeout:.0f} s; what it had is kept")
            elif status != 0:
                lines = [line for line in told.splitlines() if line.strip()]
                print("\n".join(line[:1000] for line in lines[-30:]), file=sys.stderr)
                last = lines[-1] if lines else "it said nothing"
                results.skip(stage.name, f"failed with status {status}: {last}"[:500])
            if stage.function == "headline":
                print(headline(results.data), flush=True)
    return Results(output), True


def _run(
    stage: Stage, output: Path, log: int, timeout_s: float, *, is_rehearsal: bool
) -> int | None:
    """Return the stage's exit status, None if it was killed at its deadline with its children."""
    command = [*STAGE_COMMAND, stage.function, str(output)]
    command += [*stage.arguments, *(["--rehearse"] if is_rehearsal else [])]
    environment = dict(os.environ)
    if is_rehearsal:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(  # noqa: S603
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Its compilers and tests too, where it fell or was interrupted and they did not.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Return the exit status: 0 if every stage ran and every test passed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where the JSON and the log go; default kernels/bench/results/",
    )
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help="all ends after this; default %(default)s"
    )
    parser.add_argument("--all", action="store_true", help="larger models too: 15 minutes in all")
    parser.add_argument("--only", metavar="STAGE", action="append", help="this stage; repeatable")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter")
    arguments = parser.parse_args()
    stages: tuple[Stage, ...] = REHEARSAL_STAGES if arguments.rehearse else STAGES
    budget_s = arguments.budget_s
    if arguments.all:
        stages += EXTRA_STAGES
        budget_s = max(budget_s, 900.0)
    if arguments.only:
        names = [stage.name for stage in stages]
        if unknown := set(arguments.only) - set(names):
            parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {names}")
        stages = tuple(s for s in stages if s.name in arguments.only or s.function == "rates")
    started = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    output = arguments.output / f"gpu-{started}.json"
    results, has_gpu = run_stages(
        stages, output, budget_s=budget_s, is_rehearsal=arguments.rehearse
    )
    if not has_gpu:
        output.unlink()
        output.with_suffix(".log").unlink()
        return NO_GPU
    text = tables(results.data)
    with output.with_suffix(".log").open("a") as log:
        print(f"\n{text}", file=log)
    print(text)
    print(f"\nevery figure, with its spread and its roofline: {output}")
    keys = ("is_rehearsal", "machine", "skipped", "goals")
    print(json.dumps({key: results.data.get(key) for key in keys}))
    return 1 if results.data["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
