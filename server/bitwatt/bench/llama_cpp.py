"""Time the 2B4T shape in llama.cpp (TQ2_0) beside bitwatt, in turns; the last line is JSON.

    python -m bitwatt.bench.llama_cpp [--folder build/llama-cpp] [--rounds 5]

The first run makes a virtual environment in the folder, builds the llama-cpp-python package for
this machine there, and writes 2 GB of random weights. Its model has SiLU where 2B4T has relu²:
right for timing the shape, not for comparing tokens. Heads are compared at equal precision: 16
bits, and 8.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitwatt.bench.cpu import ModelProcess
from bitwatt.bench.cpu_child import ChildConfig
from bitwatt.bench.measure import describe_machine, spread_of
from bitwatt.model.config import HeadBits
from bitwatt.model.presets import PRESETS

# Started with -P: the llama_cpp.py beside it must not hide the package of that name.
CHILD = Path(__file__).parent / "llama_cpp_child.py"
DECODE_TOKENS, PREFILL_TOKENS, NUM_THREADS = 64, 512, 2
KINDS = {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}


class Ours:
    """The same work in our engine, as `make bench` runs it."""

    def __init__(self, head_bits: HeadBits) -> None:
        num_layers = PRESETS["2B4T"].num_layers
        config = ChildConfig("2B4T", num_layers, "ternary", head_bits, NUM_THREADS)
        self._process = ModelProcess(config)
        self.instruction_set = self._process.model.instruction_set

    def seconds(self, kind: str) -> float:
        work = ("prefill", PREFILL_TOKENS) if kind == "prefill" else ("generate", DECODE_TOKENS)
        return self._process.measure(*work).seconds

    def close(self) -> None:
        self._process.close()


class Theirs:
    """llama.cpp in a process and a Python environment of its own."""

    def __init__(self, folder: Path, head_bits: int) -> None:
        python = folder / "venv" / "bin" / "python"
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(folder / "venv")])
            build = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            _run([str(python), "-m", "pip", "install", "-q", "llama-cpp-python", "gguf"], env=build)
        model = folder / f"2b4t-tq2_0-head{head_bits}.gguf"
        if not model.exists():
            unfinished = model.with_suffix(".part")
            _run([str(python), "-P", str(CHILD), "write", str(unfinished), str(head_bits)])
            unfinished.rename(model)
        self._process = subprocess.Popen(  # noqa: S603
            [str(python), "-P", str(CHILD), "serve", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self._answer()

    def seconds(self, kind: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(kind + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}")
        return line.strip()


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=env)  # noqa: S603


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Return both sides' tokens per second by head and work, rounds taken in turns, and ratios."""
    heads: tuple[HeadBits, ...] = (16, 8)
    theirs = {bits: Theirs(folder, bits) for bits in heads}
    ours = {bits: Ours(bits) for bits in heads}
    figures: dict[str, Any] = {}
    for bits in heads:
        for kind, num_tokens in KINDS.items():
            name = f"{kind}, {bits}-bit head"
            figures[name] = _take_turns(theirs[bits], ours[bits], kind, num_tokens, rounds)
            _report(name, figures[name])
    for bits in heads:
        theirs[bits].close()
        ours[bits].close()
    return {
        "benchmark": "llama_cpp",
        "machine": describe_machine(),
        "instruction_set": ours[16].instruction_set,
        "num_threads": NUM_THREADS,
        "llama_cpp": theirs[16].version,
        "rounds": rounds,
        **figures,
    }


def _take_turns(
    theirs: Theirs, ours: Ours, kind: str, num_tokens: int, rounds: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"llama_cpp": [], "bitwatt": []}
    for turn in range(rounds + 1):
        pair = {"llama_cpp": theirs.seconds(kind), "bitwatt": ours.seconds(kind)}
        if turn:  # the first warms up
            for name, seconds in pair.items():
                rates[name].append(num_tokens / seconds)
    ratios = [b / a for a, b in zip(rates["llama_cpp"], rates["bitwatt"], strict=True)]
    return {name: asdict(spread_of(values)) for name, values in {**rates, "ratio": ratios}.items()}


def _report(name: str, figures: dict[str, Any]) -> None:
    for side in ("llama_cpp", "bitwatt"):
        one = figures[side]
        print(f"{name}, {side}: {one['median']:.1f} tok/s ({one['min']:.1f}-{one['max']:.1f})")
    ratio = figures["ratio"]
    print(
        f"{name}: bitwatt at {ratio['median']:.2f} times llama.cpp's rate "
        f"({ratio['min']:.2f}-{ratio['max']:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/llama-cpp"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(compare(options.folder.resolve(), options.rounds)))


if __name__ == "__main__":
    main()
