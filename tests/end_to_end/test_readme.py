"""What the documents name exists, and what the README says to type works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bitwatt.cli import main

from tests.end_to_end.conftest import Server
from tests.extent import TEST_ALL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OF_THE_MOMENT = ("id", "created")

DOCUMENTS = sorted(
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "deploy").glob("**/*.md"),
        *(ROOT / "clients").glob("**/*.md"),
    )
    if path.is_file()
)
# Where a path that a document names may begin, beside the document's own folder.
ROOTS = [
    ROOT / name
    for name in (
        ".",
        "server",
        "server/bitwatt",
        "kernels",
        "kernels/bitwatt_kernels",
        "kernels/bitwatt_kernels/cpu",
        "clients/python",
    )
]
SOURCES = ["py", "cpp", "h", "inc", "sh", "md", "json", "toml", "yml", "yaml", "js", "css", "html"]
# Made by a command, and ignored by git.
MADE = {".venv/", "build/", "runs/"}

# Commands that no test types, and why.
NOT_RUN = {
    "bitwatt bench URL": "tests/clients/test_bench.py runs it on an address",
    "bitwatt chat": "tests/clients/test_chat.py runs it on an address",
    "bitwatt compare URL_A URL_B": "tests/clients/test_compare.py runs it on addresses",
    "bitwatt convert SRC DST": "tests/server/checkpoints/test_conversion.py converts folders",
    "bitwatt fleet STEPS": "tests/server/simulation/test_fleet.py has steps",
    "bitwatt paper": "takes up to an hour: test_paper.py measures one size, test_command.py flags",
    "bitwatt serve ORG/NAME": "tests/server/test_hub.py asks a local hub",
    "bitwatt serve PATH": "tests/server/checkpoints reads folders of every kind",
    "python -m bitwatt.bench cpu": "takes 5 GB: test_bench.py runs it on a small model",
    "python -m bitwatt.bench dense": "takes 10 GB: test_bench.py runs it on a small model",
    "python -m bitwatt.bench groups": "takes 10 minutes: test_bench.py runs it with one layer",
    "python -m bitwatt.bench.peers": "the peers are not among the dev packages",
    "python -m bitwatt.bench speculation": "half an hour and 3 GB: test_speculation.py checks it",
    "python -m bitwatt.training sizes": "takes hours: test_sizes.py trains a little",
}

# The default is the pair, and what was held out of the standard library: a minute. The tables of a
# pair are tests/server/evaluation/test_perplexity.py's affair.
LESS = [
    *("--text", str(ROOT / "server/bitwatt/processors.py")),
    str(ROOT / "server/bitwatt/builtin/fp16"),
]
QUICKLY = {
    "bitwatt eval": ["--every", "100", "--num-threads", "1", *([] if TEST_ALL else LESS)],
    "bitwatt plan": [
        *("--measure-seconds", "0.2", "--max-num-seqs", "4", "--simulated-requests", "100"),
        *("--prompt-tokens", "32", "--answer-tokens", "8-16"),
    ],
}
"""Commands that take minutes as the README says them, and what makes them a quick look."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return what the README says to type, in blocks and in lines; curl's has a test of its own."""
    lines = re.findall(r"`((?:make|bitwatt|python -m) [^`]+)`", README)
    return sorted({*lines, *(block.strip() for block in blocks("sh"))})


def paths_in(text: str) -> list[str]:
    """Return what looks like a path in `code`: a folder by its slash, a file by its suffix.

    A name in capitals stands for one to choose, and one that begins with a slash is an URL's.
    """
    names = re.findall(r"`([a-z0-9_.*-][a-z0-9_./*-]*)`", text)
    return [
        name
        for name in names
        if name.endswith("/")
        or (name.rpartition(".")[2] in SOURCES and ("/" in name or name.endswith(".py")))
    ]


def exists(name: str, document: Path) -> bool:
    return name in MADE or any(any(root.glob(name)) for root in (document.parent, *ROOTS))


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


@pytest.mark.slow(120 if TEST_ALL else 30)
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("curl")])
def test_a_command_runs_or_is_named_as_not_run(command: str, server: Server) -> None:
    """make says what it would run; bitwatt runs."""
    if command in NOT_RUN:
        return
    program, *arguments = shlex.split(command) + QUICKLY.get(command, [])
    if command == "bitwatt plan" and not TEST_ALL:  # whose own pair would take 8 s to start and end
        arguments += ["--url", server.url]
    run = {"make": ["make", "-n"], "bitwatt": [sys.executable, "-m", "bitwatt"]}[program]
    share = {} if TEST_ALL else {"BITWATT_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*run, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | share
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_nothing_is_named_as_not_run_that_the_readme_does_not_say() -> None:
    assert set(commands()) >= NOT_RUN.keys()


def test_every_flag_named_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) | {"--help"}
    assert set(re.findall(r"`[^`\n]*?(--[a-z][a-z0-9-]+)", README)) <= known


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [name for name in paths_in(text) if not exists(name, document)]
    assert missing == []


@pytest.mark.parametrize("part", ["## Life of a request", "| To add | Touch |"])
def test_the_readmes_life_of_a_request_and_to_add_name_paths(part: str) -> None:
    assert paths_in(README.split(part)[1].split("\n## ")[0])


def test_every_line_of_the_readmes_tree_exists() -> None:
    house = README.split("## The house")[1].split("```")[1]
    folder = ""
    for line in house.splitlines():
        if line and not line.startswith(" "):
            folder = line.split()[0]
        names = re.split(r"\s{2,}", line.strip())[0].split()
        for name in names:
            path = ROOT / (name if name == folder else f"{folder}{name}")
            assert path.exists(), path


def test_the_readmes_tree_has_every_room() -> None:
    house = README.split("## The house")[1].split("```")[1]
    rooms = {
        path.name
        for root in ("server/bitwatt", "kernels/bitwatt_kernels")
        for path in (ROOT / root).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert {room for room in rooms if f"{room}/" not in house} == set()
