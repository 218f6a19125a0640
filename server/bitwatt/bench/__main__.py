"""`python -m bitwatt.bench [NAME ...]`: the CPU benchmarks; the last line printed is one JSON."""

import argparse
import json
import sys
from collections.abc import Callable

from bitwatt.bench.attention import bench_attention
from bitwatt.bench.cpu import bench_cpu, bench_dense, bench_groups
from bitwatt.bench.engine import bench_batching, bench_exactness
from bitwatt.bench.grammars import bench_grammars
from bitwatt.bench.hostile import bench_hostile
from bitwatt.bench.loading import bench_loading
from bitwatt.bench.measure import describe_machine
from bitwatt.bench.mirrors import bench_mirrors
from bitwatt.bench.scheduling import bench_scheduler
from bitwatt.bench.serving import bench_serving
from bitwatt.bench.speculation import bench_speculation
from bitwatt.bench.telemetry import bench_telemetry

_BENCHES: dict[str, Callable[..., object]] = {
    "scheduler": lambda: [bench_scheduler(num_running) for num_running in (1, 64, 256)],
    "serving": bench_serving,
    "hostile": bench_hostile,
    "batching": bench_batching,
    "exactness": bench_exactness,
    "grammars": bench_grammars,
    "speculation": bench_speculation,
    "telemetry": bench_telemetry,
    "mirrors": bench_mirrors,
    "cpu": bench_cpu,
    "dense": bench_dense,
    "groups": bench_groups,
    "attention": bench_attention,
    "loading": bench_loading,
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m bitwatt.bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *_BENCHES], metavar="NAME")
    parser.add_argument("--num-threads", type=int, help="CPU threads of the kernels' benchmarks")
    parser.add_argument("--cpu-isa", help="instruction set of the kernels in them")
    options = parser.parse_args()
    names = options.names or list(_BENCHES)
    of_kernels = {"num_threads": options.num_threads, "cpu_isa": options.cpu_isa}
    knobs = dict.fromkeys(("cpu", "dense", "groups", "attention"), of_kernels)
    results: dict[str, object] = {"machine": describe_machine()}
    for name in names:
        print(f"{name} …", file=sys.stderr)
        results[name] = _BENCHES[name](**knobs.get(name, {}))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
