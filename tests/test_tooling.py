"""What the workflow, the hooks and CI's script name exists: make targets, scripts, programs."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.conftest import UNITS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def hooks() -> list[dict]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # nothing is fetched
    return [hook for repo in config["repos"] for hook in repo["hooks"]]


def steps(workflow: Path) -> Iterator[str]:
    """Yield each command line of a workflow."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_one_by_its_schema(workflow: Path) -> None:
    schema = ["--builtin-schema", "vendor.github-workflows"]
    command = [sys.executable, "-m", "check_jsonschema", *schema, str(workflow)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_workflow_of_ci_calls_the_words_a_person_types() -> None:
    lines = list(steps(ROOT / ".github/workflows/ci.yml"))
    assert lines
    for line in lines:
        program, *arguments = line.split()
        if program == "make":
            assert set(arguments) <= TARGETS, line
        else:
            assert program == "bash"
            assert (ROOT / arguments[0]).is_file(), line


def test_ci_runs_every_python_that_the_package_names_and_pip_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    named = [line.removeprefix(prefix) for line in project["classifiers"] if prefix in line]
    taken = SpecifierSet(project["requires-python"])
    assert named == [f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in taken]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["check-and-test"]["strategy"]["matrix"]["python"] == named


def test_the_script_of_ci_calls_make_for_targets_that_exist() -> None:
    last = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert last.startswith("BITWATT_TEST_ALL=1 make ")
    assert set(last.split("make ")[1].split()) <= TARGETS


def test_hooks_are_programs_that_the_development_install_has() -> None:
    for hook in hooks():
        program = hook["entry"].split()[0]
        if program.startswith(".venv/bin/"):
            program = str(Path(sys.executable).parent / Path(program).name)
        assert shutil.which(program), hook["entry"]


def test_pre_commit_accepts_its_configuration() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_hooks_run_what_make_check_runs() -> None:
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    checked = set(re.findall(r"\$\(BIN\)/(\S+)", check))
    hooked = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks()}
    assert checked <= hooked


def test_modules_that_one_worker_runs_together_exist() -> None:
    assert [path for path in UNITS if not (ROOT / path).is_file()] == []
