"""Time other CPU engines beside bitwatt, in turns, each in a process of its own.

    python -m bitwatt.bench.peers [--folder build/peers] [--rounds 3] [PEER ...]

A peer of the list is a package of PyPI, installed once into a virtual environment of the folder,
and a file of random weights in its format, written there once (up to 5 GB). Prints a table in
Markdown; the last line is JSON. bitwatt runs what the peer runs: the same shape, a head of as many
bits. The shape is that of BitNet b1.58 2B4T or of a Ternary-Bonsai; llama.cpp's `bitnet` has SiLU
where 2B4T has relu²: right for timing, not for comparing tokens. Work that takes a peer a minute
is done once.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from bitwatt.bench.cpu import ModelProcess
from bitwatt.bench.cpu_child import ChildConfig
from bitwatt.bench.measure import describe_machine, spread_of
from bitwatt.bench.peer_files import write_bf16_folder, write_gguf
from bitwatt.model.presets import PRESETS

# Started with -P: what lies beside it must not hide a package of its environment.
CHILD = Path(__file__).with_name("peer_child.py")
NUM_THREADS = 2
LONG_S = 60.0  # of one figure of a peer, after which no round is begun
WORK = (("decode", 1), ("decode", 8), ("prefill", 128), ("prefill", 512))

_INSTALLED: dict[str, list[str]] = {
    "llama-cpp-python": ["llama-cpp-python"],
    "ik-llama-cpp-python": ["ik-llama-cpp-python", "numpy"],
    # Without torch, which its ternary model doesn't use.
    "litespark-inference": ["numpy", "safetensors", "tokenizers", "huggingface_hub"],
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine with one format of weights, and what of ours stands beside it.

    linears, embedding  formats of a GGUF file; None for a folder of bfloat16 masters
    batches             whether it decodes several sequences at once
    """

    name: str
    package: str
    ours: ChildConfig
    linears: str | None = None
    embedding: str | None = None
    batches: bool = True


_OURS = ChildConfig("2B4T", PRESETS["2B4T"].num_layers, "ternary", 16, NUM_THREADS)
_WITH_INT8_HEAD = replace(_OURS, head_bits=8)


_LLAMA, _IK = "llama-cpp-python", "ik-llama-cpp-python"
# The weights that share a scale with ours beside it; TQ2_0's 256 would take two of ours.
_GROUPS = {"Q2_0": 64, "TQ2_0": 128}


def _bonsai(preset: str, weights: str) -> Peer:
    num_layers = PRESETS[preset].num_layers
    ours = ChildConfig(preset, num_layers, "ternary", 16, NUM_THREADS)
    ours = replace(ours, group=_GROUPS[weights], has_ternary_head=True)
    return Peer(f"llama.cpp {weights}, {preset}", _LLAMA, ours, weights, weights)


PEERS = [
    Peer("llama.cpp TQ2_0, head F16", _LLAMA, _OURS, "TQ2_0", "F16"),
    Peer("llama.cpp TQ2_0, head Q8_0", _LLAMA, _WITH_INT8_HEAD, "TQ2_0", "Q8_0"),
    Peer("ik_llama.cpp IQ2_BN, head Q8_0", _IK, _WITH_INT8_HEAD, "IQ2_BN", "Q8_0"),
    Peer("litespark, head int8", "litespark-inference", _WITH_INT8_HEAD, batches=False),
    Peer("llama.cpp F16", _LLAMA, replace(_OURS, weights="dense"), "F16", "F16"),
    _bonsai("Bonsai 1.7B", "Q2_0"),
    _bonsai("Bonsai 4B", "Q2_0"),
    # Q2_0 has vector instructions there on few processors, TQ2_0 on all.
    _bonsai("Bonsai 1.7B", "TQ2_0"),
]


class _Theirs:
    """A peer in a process and a Python environment of its own."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        python = _python(peer.package, folder)
        model = _model(peer, folder)
        command = [str(python), "-P", str(CHILD), "serve", peer.package, str(model)]
        self._process = subprocess.Popen(  # noqa: S603
            [*command, str(NUM_THREADS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._process.pid
        try:
            self.version: str = self._answer()["version"]
        except BaseException:
            self.close()
            raise

    def seconds(self, kind: str, count: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {count}\n")
        self._process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._process:  # closes the pipes, at which it ends, and waits
            pass

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # a library may have said something before
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the peer's process ended with status {self._process.wait()}")


def _python(package: str, folder: Path) -> Path:
    python = folder / package / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder / package)])
        install = [str(python), "-m", "pip", "install", "-q"]
        # Compiled for this machine, where it is compiled here.
        _run([*install, *_INSTALLED[package]], {"CMAKE_ARGS": "-DGGML_NATIVE=ON"})
        if package not in _INSTALLED[package]:
            _run([*install, "--no-deps", package])
    return python


def _model(peer: Peer, folder: Path) -> Path:
    config = PRESETS[peer.ours.preset]
    name = f"{peer.ours.preset}-{peer.linears or 'masters'}-{peer.embedding or 'bf16'}"
    path = folder / (name.replace(" ", "-") + (".gguf" if peer.linears else ""))
    if not path.exists():
        print(f"writing {path.name}", file=sys.stderr)
        unfinished = path.with_suffix(".part")
        if peer.linears is None or peer.embedding is None:
            write_bf16_folder(unfinished, config)
        else:
            write_gguf(unfinished, config, peer.linears, peer.embedding)
        unfinished.rename(path)
    return path


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=os.environ | (env or {}))  # noqa: S603


def compare(peer: Peer, folder: Path, rounds: int) -> dict[str, Any]:
    """Return both sides' tokens per second by work, rounds taken in turns, ratios and memory."""
    figures: dict[str, Any] = {"peer": peer.name}
    with _Theirs(peer, folder) as theirs, ModelProcess(peer.ours) as ours:
        figures |= {"version": theirs.version, "instruction_set": ours.model.instruction_set}
        for kind, count in WORK:
            if kind == "decode" and count > 1 and not peer.batches:
                continue
            pairs = [(theirs.seconds(kind, count), ours.measure(kind, count).seconds)]
            while len(pairs) <= rounds and sum(pair[0] for pair in pairs) < LONG_S:
                pairs.append((theirs.seconds(kind, count), ours.measure(kind, count).seconds))
            pairs = pairs[1:] or pairs  # the first warms up, where that's worth a minute
            figures[f"{kind}_{count}"] = {
                "theirs": asdict(spread_of([count / pair[0] for pair in pairs])),
                "ours": asdict(spread_of([count / pair[1] for pair in pairs])),
                "ratio": asdict(spread_of([pair[0] / pair[1] for pair in pairs])),
            }
        figures["resident_bytes"] = {
            "theirs": _resident_bytes(theirs.pid),
            "ours": _resident_bytes(ours.pid),
        }
    return figures


def _resident_bytes(pid: int) -> int | None:
    """Return VmRSS, files mapped included: a peer may map its weights."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return a row a peer: its rate, ours, and ours as a multiple."""
    works = [f"{kind}_{count}" for kind, count in WORK]
    titles = [f"{kind} {count}, tok/s" for kind, count in WORK]
    lines = [f"| | {' | '.join(titles)} | resident |", "|---|" + "--:|" * (len(works) + 1)]
    for one in results:
        cells = []
        for work in works:
            if work in one:
                theirs, ours, ratio = (one[work][side] for side in ("theirs", "ours", "ratio"))
                cells.append(
                    f"{_rounded(theirs['median'])} → {_rounded(ours['median'])} "
                    f"({ratio['median']:.1f}×)"
                )
            else:
                cells.append("–")
        resident = one["resident_bytes"]
        if None in resident.values():
            cells.append("unknown")
        else:
            theirs, ours = (resident[side] / 1e9 for side in ("theirs", "ours"))
            cells.append(f"{theirs:.1f} → {ours:.1f} GB")
        lines.append(f"| {one['peer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rounded(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def main() -> None:
    """Compare with the peers named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m bitwatt.bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [peer.name for peer in PEERS]
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of: {'; '.join(names)}")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.peers:
        if name not in names:
            parser.error(f"{name!r} is no peer; there are: {'; '.join(names)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for peer in PEERS:
        if options.peers and peer.name not in options.peers:
            continue
        results.append(compare(peer, options.folder.resolve(), options.rounds))
        print(as_markdown(results[-1:]), file=sys.stderr, flush=True)
    print(as_markdown(results))
    told = {"benchmark": "peers", "machine": describe_machine(), "num_threads": NUM_THREADS}
    print(json.dumps(told | {"rounds": options.rounds, "peers": results}))


if __name__ == "__main__":
    main()
