"""`python -m tests.frameworks`: clients and frameworks by their base URL alone, as a table.

Each client's script in clients/ runs its cases against two servers: `bitwatt serve` with the
embedded pair, for answers, streams, schemas and forced calls, and the same server over a model that
plays a part (scripted.py), for tools that the model may call or not, and for thinking. The packages
are installed below build/frameworks, from their registries, once. The status is 1 where a case
failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bitwatt.builtin import TERNARY

from tests.end_to_end.conftest import start_server, stop_server

HERE = Path(__file__).parent
ROOMS = HERE.parents[1] / "build" / "frameworks"
PYTHON = {
    "python": ["-r", str(HERE / "requirements.txt")],
    "openai-2": ["openai<3"],
    "lm-eval": ["lm_eval[api]", "transformers"],
    "aiperf": ["aiperf"],
    "guidellm": ["guidellm", "jinja2"],  # a chat template needs jinja2, and guidellm doesn't
}
"""What each room of Python's holds."""
BY_PIP = {"guidellm": ["torch"]}
"""What pip installs there before: it reads PIP_EXTRA_INDEX_URL, where PyTorch's CPU builds are."""


@dataclass(frozen=True)
class Client:
    """A package, and the script of it in its room."""

    package: str
    script: str
    room: str = "python"

    def version(self) -> str:
        """Return the version that is installed."""
        if self.room == "node":
            path = ROOMS / "node" / "node_modules" / self.package / "package.json"
            return str(json.loads(path.read_text())["version"])
        told = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        return subprocess.check_output([_python(self.room), "-c", told], text=True).strip()

    def run(self, environment: dict[str, str]) -> list[tuple[str, str | None]]:
        """Return the cases with what went wrong in each, None for nothing."""
        if self.room == "node":
            command = ["node", str(ROOMS / "node" / self.script)]
        else:
            command = [_python(self.room), str(HERE / "clients" / self.script)]
        done = subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, timeout=1800
        )
        cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        faults = [(case["case"], case["fault"]) for case in cases]
        return faults if done.returncode == 0 else [*faults, ("script", f"{done.returncode}")]


CLIENTS = (
    Client("openai", "openai_python.py"),
    Client("openai", "openai_python.py", "openai-2"),
    Client("anthropic", "anthropic_python.py"),
    Client("langchain-openai", "langchain_openai_.py"),
    Client("pydantic-ai-slim", "pydantic_ai_.py"),
    Client("instructor", "instructor_.py"),
    Client("litellm", "litellm_.py"),
    Client("llm", "llm_.py"),
    Client("lm_eval", "lm_eval_.py", "lm-eval"),
    Client("aiperf", "aiperf_.py", "aiperf"),
    Client("guidellm", "guidellm_.py", "guidellm"),
    Client("openai", "openai_node.mjs", "node"),
    Client("ai", "ai_sdk.mjs", "node"),
)


def _python(room: str) -> str:
    return str(ROOMS / room / "bin" / "python")


def install(rooms: set[str]) -> None:
    """Make those of the rooms that are missing; uv, for pip tries versions for minutes."""
    for room, wanted in PYTHON.items():
        if room in rooms and not Path(_python(room)).exists():
            subprocess.check_call([sys.executable, "-m", "venv", str(ROOMS / room)])
            first = ["uv", *BY_PIP.get(room, ())]
            subprocess.check_call([_python(room), "-m", "pip", "install", "-q", *first])
            uv = str(ROOMS / room / "bin" / "uv")
            subprocess.check_call([uv, "pip", "install", "-q", "-p", _python(room), *wanted])
    node = ROOMS / "node"
    if "node" in rooms and not (node / "node_modules").exists():
        node.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", node)
        subprocess.check_call(["npm", "install", "--silent"], cwd=node)


def main() -> int:
    """Return 0 where every case worked."""
    parser = argparse.ArgumentParser(prog="python -m tests.frameworks", description=__doc__)
    parser.add_argument("--only", help="run the scripts whose names have this")
    given = parser.parse_args()
    clients = [one for one in CLIENTS if given.only is None or given.only in one.script]
    install({client.room for client in clients})
    if (ROOMS / "node").exists():
        for path in (HERE / "clients").glob("*.mjs"):
            shutil.copy(path, ROOMS / "node")  # beside node_modules, where imports are looked up
    scripted = subprocess.Popen(
        [sys.executable, "-m", "tests.frameworks.scripted"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert scripted.stdout is not None
    assert scripted.stdin is not None
    real = start_server()
    rows, has_failed = [], False
    try:
        environment = {
            "REAL_URL": real.url,
            "SCRIPTED_URL": scripted.stdout.readline().strip(),
            "TOKENIZER": str(TERNARY),
            "BITWATT_PYTHON": sys.executable,
        }
        for client in clients:
            faults = client.run(environment)
            works = ", ".join(n.replace("_", " ") for n, fault in faults if fault is None)
            fails = "; ".join(f"{name}: {fault}" for name, fault in faults if fault is not None)
            has_failed = has_failed or bool(fails) or not faults
            kind = "Node" if client.room == "node" else "Python"
            rows.append((f"`{client.package}`, {kind}", client.version(), works, fails))
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        stop_server(real)
        scripted.stdin.close()
        scripted.wait(timeout=30)
    print("| Client | Version | Works | Fails |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
