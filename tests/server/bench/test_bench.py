"""The benchmarks run and say what they measured; how fast is not a test's business."""

import json
import subprocess
import sys


def run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitwatt.bench", *names]
    return subprocess.run(command, capture_output=True, text=True)


def test_last_line_is_one_json_with_the_machine_and_each_figure_s_spread() -> None:
    ran = run("scheduler")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["machine"].keys() == {"cpu", "num_cpus", "python", "versions", "commit"}
    assert [entry["num_running"] for entry in result["scheduler"]] == [1, 64, 256]
    for entry in result["scheduler"]:
        spread = entry["us_per_step"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["n"] == 500


def test_an_unknown_benchmark_is_refused() -> None:
    ran = run("speed")
    assert ran.returncode == 2
    assert "speed" in ran.stderr
