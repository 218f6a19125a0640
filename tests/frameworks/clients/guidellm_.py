"""guidellm's default sweep, but for the tokenizer, the model's folder, and shorter strategies."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import REAL, run

TOKENIZER = os.environ.get("TOKENIZER", "")  # the embedded model's folder
SWEEP_SIZE = 10  # one request after the other, all at once, and rates between


def sweep():
    folder = Path(tempfile.mkdtemp())
    command = [Path(sys.executable).with_name("guidellm"), "run"]
    command += ["--backend", f"kind=openai_http,target={REAL}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"]
    command += ["--profile", "kind=sweep", "--constraint", "kind=max_requests,count=8"]
    command += ["--output", f"kind=json,path={folder / 'benchmarks.json'}", "--disable-console"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    benchmarks = json.loads((folder / "benchmarks.json").read_text())["benchmarks"]
    assert len(benchmarks) == SWEEP_SIZE, len(benchmarks)
    totals = [benchmark["metrics"]["request_totals"] for benchmark in benchmarks]
    assert all(total["successful"] and not total["errored"] for total in totals), totals


if __name__ == "__main__":
    run(sweep)
