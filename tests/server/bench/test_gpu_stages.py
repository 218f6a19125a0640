"""`make gpu` outlives its stages: what falls or hangs ends alone, and what was measured stays."""

import json
import sys
import time
from pathlib import Path

import pytest
from bitwatt.bench import gpu
from bitwatt.bench.gpu import BUDGET_S, EXTRA_STAGES, STAGES, Stage, run_stages

FAKE_STAGE = """
import json, os, subprocess, sys, time
from pathlib import Path
name, path = sys.argv[1], Path(sys.argv[2])
data = json.loads(path.read_text())
data.setdefault("rows", []).append(name)
path.write_text(json.dumps(data))
if name == "faults":
    os.abort()
if name == "raises":
    print("x" * 200_000)
    raise RuntimeError("an illegal memory access was encountered")
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sys.argv[3]).write_text(str(child.pid))
    time.sleep(600)
if name == "no GPU":
    print("make gpu cannot run here: torch sees no NVIDIA GPU", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(autouse=True)
def fake_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGE_COMMAND", (sys.executable, "-c", FAKE_STAGE))


def stage(function: str, *arguments: str, deadline_s: float = 60) -> Stage:
    return Stage(f"the one that {function}", function, arguments, 1, deadline_s)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_stage_that_falls_or_hangs_leaves_its_rows_and_the_stages_behind_it(
    tmp_path: Path,
) -> None:
    pid_file, output = tmp_path / "pid", tmp_path / "out.json"
    stages = [
        stage("measures"),
        stage("faults"),
        stage("raises"),
        stage("hangs", str(pid_file), deadline_s=3),
        stage("measures"),
    ]
    results, has_gpu = run_stages(stages, output, budget_s=100, is_rehearsal=False)
    assert has_gpu
    saved = json.loads(output.read_text())
    assert saved == results.data
    assert saved["rows"] == ["measures", "faults", "raises", "hangs", "measures"]
    assert saved["skipped"] == {
        "the one that faults": "failed with status -6: it said nothing",
        "the one that raises": "failed with status 1: "
        "RuntimeError: an illegal memory access was encountered",
        "the one that hangs": "killed after 3 s; what it had is kept",
    }
    assert "x" * 200_000 in output.with_suffix(".log").read_text()
    for _ in range(100):  # its compilers and tests end with it
        if not is_alive(int(pid_file.read_text())):
            break
        time.sleep(0.05)
    assert not is_alive(int(pid_file.read_text()))


def test_nothing_begins_once_the_time_is_up(tmp_path: Path) -> None:
    stages = [stage("measures"), stage("faults")]
    results, _ = run_stages(stages, tmp_path / "out.json", budget_s=0, is_rehearsal=False)
    assert "rows" not in results.data
    told = "out of time: --budget-s is 0"
    assert results.data["skipped"] == {s.name: told for s in stages}


def test_without_a_gpu_the_first_stage_is_the_last(tmp_path: Path) -> None:
    stages = [stage("no GPU"), stage("measures")]
    results, has_gpu = run_stages(stages, tmp_path / "out.json", budget_s=9, is_rehearsal=False)
    assert not has_gpu
    assert results.data["rows"] == ["no GPU"]


def test_the_stages_fit_nine_minutes_by_estimate_and_the_headline_is_first() -> None:
    assert sum(s.estimate_s for s in STAGES) <= 9 * 60
    assert BUDGET_S <= 9 * 60
    assert [s.function for s in STAGES[:3]] == ["rates", "headline", "serving"]
    for s in STAGES + EXTRA_STAGES:
        assert s.estimate_s < s.deadline_s
