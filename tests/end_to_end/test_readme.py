"""What the README says to type works, and what it shows is what comes back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OF_THE_MOMENT = ("id", "created")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"serve", "test", "check", "bench", "gpu"} <= targets <= known


def test_make_serve_and_test_do_their_own_set_up() -> None:
    for target, program in (("serve", "bitwatt serve --port 8123"), ("test", "pytest")):
        command = ["make", "-n", "-B", "--no-print-directory", target, "ARGS=--port 8123"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "-m venv .venv" in ran
        assert "pip install" in ran
        assert program in ran.splitlines()[-1]


@pytest.mark.needs_program("curl")
def test_curl_example_gets_the_answer_shown(server: Server) -> None:
    [command] = [block for block in blocks("sh") if block.startswith("curl")]
    assert "http://127.0.0.1:8000/" in command
    command = command.replace("http://127.0.0.1:8000", server.url)
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    [shown] = blocks("json")
    expected, answer = json.loads(shown), json.loads(ran.stdout)
    for key in OF_THE_MOMENT:
        assert type(answer.pop(key)) is type(expected.pop(key))
    # A cached prefix, and whether joules can be measured, depend on machine and moment.
    for usage in (answer["usage"], expected["usage"]):
        usage.pop("prompt_tokens_details")
        usage.pop("bitwatt")
    assert answer == expected


def test_python_example_runs() -> None:
    [source] = blocks("python")
    ran = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip()


def test_every_path_named_exists() -> None:
    life = README.split("## Life of a request")[1].split("##")[0]
    for name in re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", life):
        assert (ROOT / "server/bitwatt" / name).exists(), name
    house = README.split("## The house")[1].split("```")[1]
    folder = ""
    for line in house.splitlines():
        if line and not line.startswith(" "):
            folder = line.split()[0]
        names = re.split(r"\s{2,}", line.strip())[0].split()
        for name in names:
            path = ROOT / (name if name == folder else f"{folder}{name}")
            assert path.exists(), path
