"""`make gpu` is ready to run: its stages rehearse without a GPU, and without one it says so."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.extent import TEST_ALL

REPOSITORY = Path(__file__).resolve().parents[3]
# What the server needs and a GPU image lacks.
ABSENT = (
    "fastapi",
    "hypothesis",
    "llguidance",
    "msgspec",
    "pydantic",
    "starlette",
    "tokenizers",
    "uvicorn",
    "zmq",
)
# Put first on the path, so that every process of the bench lacks them.
SITE = f"import sys\nsys.modules |= dict.fromkeys({ABSENT!r})\n"


@pytest.fixture
def run_bench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join((str(site), "server", "kernels", "clients/python"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bitwatt.bench.gpu", "--output", str(tmp_path), *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return run


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_gets_one_clear_line(run_bench: Run, tmp_path: Path) -> None:
    run = run_bench()
    assert run.returncode == 2
    assert run.stderr.splitlines()[1:] == ["make gpu cannot run here: torch sees no GPU"]
    assert list(tmp_path.glob("gpu-*")) == []


def rehearse(run_bench: Run, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return the results and what was printed, of a rehearsal that skipped nothing and served."""
    run = run_bench("--rehearse", *arguments)
    assert run.returncode == 0, run.stderr
    (output,) = folder.glob("gpu-*.json")
    results: dict[str, Any] = json.loads(output.read_text())
    assert results["skipped"] == {}
    check = results["serving_check"]
    assert check["num_equal"] == check["num_tokens"] == 4 * 2
    assert {row["sampling"]["temperature"] for row in results["serving"]} == {0.0, 0.8}
    assert "8 of 8 tokens" in run.stdout
    return results, run.stdout


@pytest.mark.slow
@pytest.mark.skipif(TEST_ALL, reason="every stage is rehearsed, this one too")
def test_serving_rehearses_with_the_packages_of_a_gpu_image(run_bench: Run, tmp_path: Path) -> None:
    rehearse(run_bench, tmp_path, "--only", "serving")


@pytest.mark.slow(60)
@pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.timeout(600)
def test_every_stage_rehearses_with_the_packages_of_a_gpu_image(
    run_bench: Run, tmp_path: Path
) -> None:
    results, printed = rehearse(run_bench, tmp_path)
    assert results["is_rehearsal"]
    assert results["tests"]["passed"] > 10
    assert {row["num_tokens"] for row in results["matmuls"]} == {1, 20}
    for row in results["matmuls"]:
        assert row["ternary"]["median_s"] > 0
        assert row["ternary_roofline_s"] > 0
        assert row["bf16"]["way"] in ("x·Wᵀ", "W·x", "W·xᵀ")
    cases = {
        (row["weights"], row["phase"], row["pdl"], row["persistent_step"])
        for row in results["end_to_end"]
    }
    assert cases == {
        ("ternary", "decode", False, False),
        ("ternary", "prefill", False, False),
        ("dense", "decode", False, False),
        ("dense", "prefill", False, False),
        ("ternary", "decode", True, False),
        ("ternary", "decode", False, True),
    }
    persistent = [row for row in results["end_to_end"] if row["persistent_step"]]
    assert [row["num_sequences"] for row in persistent] == [1, 2]
    assert all(row["equals_five_kernels"] for row in persistent)
    assert {"attention", "head 8 bits"} <= {row["op"] for row in results["layer_ops"]}
    assert {row["phase"] for row in results["speedups"]} == {"decode", "prefill"}
    told = printed.splitlines()
    assert told[0].startswith("rehearsal decode, batch 1: ternary ")
    assert "a rehearsal, whose figures mean nothing" in printed
    assert json.loads(told[-1])["machine"]["packages"]["torch"]


def test_the_kernels_tests_are_collected_with_the_packages_of_a_gpu_image() -> None:
    """Neither hypothesis nor pytest's plugins are there; one hook of xdist's once ended the run."""
    script = f"""
import sys, pytest
sys.modules |= dict.fromkeys({ABSENT!r})
sys.exit(pytest.main(sys.argv[1:]))
"""
    options = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-c", script, *options, "--collect-only", "tests/kernels/gpu/ops"],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(("server", "kernels", "clients/python")),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TRITON_INTERPRET": "1",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
