"""`make gpu` is ready to run: its stages rehearse without a GPU, and without one it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]
# What the server needs and a GPU image lacks.
ABSENT = ("fastapi", "msgspec", "pydantic", "starlette", "tokenizers", "uvicorn", "zmq")
RUN = f"""
import runpy, sys
sys.modules |= dict.fromkeys({ABSENT!r})
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_module("bitwatt.bench.gpu", run_name="__main__")
"""


def run_bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(("server", "kernels", "clients/python"))
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_gets_one_clear_line() -> None:
    run = run_bench()
    assert run.returncode == 2
    assert run.stderr == "make gpu cannot run here: torch sees no NVIDIA GPU\n"


def test_every_stage_rehearses_with_the_packages_of_a_gpu_image(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run = run_bench("--rehearse", "--skip-tests", "--output", str(output), TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text())
    assert results["is_rehearsal"]
    assert results["skipped"] == {}
    assert {row["num_tokens"] for row in results["matmuls"]} == {1, 20}
    for row in results["matmuls"]:
        assert row["ternary"]["median_s"] > 0
        assert row["ternary_roofline_s"] > 0
    cases = {(row["weights"], row["phase"], row["pdl"]) for row in results["end_to_end"]}
    assert cases == {
        ("ternary", "decode", False),
        ("ternary", "prefill", False),
        ("dense", "decode", False),
        ("dense", "prefill", False),
        ("ternary", "decode", True),
    }
    assert {"attention", "head 8 bits"} <= {row["op"] for row in results["layer_ops"]}
    assert {row["phase"] for row in results["speedups"]} == {"decode", "prefill"}
    assert "a rehearsal, whose figures mean nothing" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1])["machine"]["packages"]["torch"]


def test_the_kernels_tests_are_collected_with_the_packages_of_a_gpu_image() -> None:
    """Neither hypothesis nor pytest's plugins are there; one hook of xdist's once ended the run."""
    script = f"""
import sys, pytest
sys.modules |= dict.fromkeys({("hypothesis", *ABSENT)!r})
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
