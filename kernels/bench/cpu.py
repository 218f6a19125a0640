"""Benchmark the native CPU backend on random weights of the 2B4T shape; the last line is JSON.

python kernels/bench/cpu.py [--layers N] [--repeats N]
"""

import argparse
import json

from bitwatt.bench.cpu import bench_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="2B4T")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    result = bench_cpu(
        preset=options.preset,
        num_layers=options.layers,
        repeats=options.repeats,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
