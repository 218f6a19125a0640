"""`python -m tests.soak --minutes 30`: the embedded pair under mixed traffic and accidents."""

import argparse
import json
import sys
from pathlib import Path

from bitwatt.bench.measure import describe_machine

from tests.soak.run import soak


def main() -> int:
    """Return 0 where everything added up."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=12, help="of each model")
    parser.add_argument("--epoch-seconds", type=float, default=20.0)
    parser.add_argument("--epochs-per-server", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = soak(
        60 * given.minutes,
        epoch_s=given.epoch_seconds,
        epochs_per_server=given.epochs_per_server,
        num_callers=given.callers,
        seed=given.seed,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(found.as_json() | {"machine": describe_machine()}, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
