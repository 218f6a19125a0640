"""`python -m tests.deploy.ray_throughput`: tokens a second of one and of two replicas under Ray.

Each replica is pinned to a CPU of its own, engine and all. Callers, Ray's proxy and its controller
are pinned to what CPUs are left, or share the replicas' where none is.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.deploy.test_ray import Cluster, body

_STREAMS = 24  # which one replica of ray_cluster.py takes at once
_TOKENS = 200
_ROUNDS = 5


def main() -> int:
    """Print rates in turns, and the ratio of their medians."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        print("two replicas pinned to CPUs of their own need two CPUs", file=sys.stderr)
        return 1
    if len(cpus) > 2:
        os.sched_setaffinity(0, cpus[2:])
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="bitwatt-ray-")))
    rates: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(_ROUNDS):
            for count, told in rates.items():
                cluster.tell(f"scale {count}")
                cluster.wait_for("told")
                cluster.wait_replicas(count)
                _pin(cluster, cpus)
                asyncio.run(_rate(cluster.url))  # warm-up
                told.append(asyncio.run(_rate(cluster.url)))
                print(f"{count} replicas: {told[-1]:,.0f} tokens/s", flush=True)
    finally:
        cluster.close()
    one, two = (statistics.median(told) for told in rates.values())
    print(f"medians of {_ROUNDS} on {len(cpus)} CPUs: {one:,.0f} and {two:,.0f}, {two / one:.2f}×")
    return 0


def _pin(cluster: Cluster, cpus: list[int]) -> None:
    for number, pid in enumerate(sorted(cluster.pids())):
        for process in [pid, *_children(pid)]:
            for thread in Path(f"/proc/{process}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {cpus[number]})


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *_children(child)]
    return found


async def _rate(url: str) -> float:
    limits = httpx.Limits(max_connections=_STREAMS)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:

        async def stream() -> int:
            while True:
                request = http.stream("POST", f"{url}/v1/completions", json=body(_TOKENS))
                async with request as response:
                    data = await response.aread()
                if response.status_code != 503:  # the proxy's queue is full, for a moment
                    assert b"[DONE]" in data, data[:300]
                    return _TOKENS
                await asyncio.sleep(0.02)

        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*(stream() for _ in range(_STREAMS))))
        return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
