"""NVIDIA's aiperf with its defaults, but for the tokenizer, which is the model's folder."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import REAL, run

TOKENIZER = os.environ.get("TOKENIZER", "")  # the embedded model's folder


def profile():
    folder = Path(tempfile.mkdtemp())
    command = [Path(sys.executable).with_name("aiperf"), "profile", "--model", "builtin"]
    command += ["--url", REAL, "--tokenizer", TOKENIZER, "--ui", "none"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-1500:]
    [path] = folder.rglob("profile_export.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records
    assert all(record.get("error") is None for record in records)


if __name__ == "__main__":
    run(profile)
