"""What telemetry costs: the embedded model's throughput with everything observed, and with nothing.

Run as a program it is `bitwatt` with telemetry taken out, which no setting does.
"""

import asyncio
import runpy
from dataclasses import asdict
from typing import Any

from bitwatt import builtin
from bitwatt.bench.measure import spread_of
from bitwatt.bench.serving import serve, tokens_per_s
from bitwatt.telemetry.metering import ModelEnergy
from bitwatt.telemetry.metrics import ModelMetrics
from bitwatt.telemetry.request_metrics import RequestMetrics

__all__ = ["bench_telemetry"]

_NUM_CLIENTS = 32
_MAX_TOKENS = 256
_NUM_WINDOWS = 7
_OBSERVERS = (
    (ModelMetrics, "on_stats"),
    (ModelMetrics, "on_ended"),
    (RequestMetrics, "on_output"),
    (RequestMetrics, "on_end"),
    (ModelEnergy, "on_step"),
)


async def _run() -> dict[str, Any]:
    flags = ("--max-num-seqs", str(_NUM_CLIENTS), "--no-prefix-caching")
    rates: dict[str, list[float]] = {"on": [], "off": []}
    cpu_s: dict[str, list[float]] = {"on": [], "off": []}
    async with (
        serve(builtin.TERNARY, *flags) as on,
        serve(builtin.TERNARY, *flags, program="bitwatt.bench.telemetry") as off,
    ):
        for window in range(_NUM_WINDOWS + 1):
            for name, server in (("on", on), ("off", off)):
                before = server.cpu_s()
                rate = await tokens_per_s(server.port, _NUM_CLIENTS, _MAX_TOKENS)
                if window:  # the first is a warm-up
                    rates[name].append(rate)
                    cpu_s[name].append(server.cpu_s() - before)

    def pairs(values: dict[str, list[float]]) -> list[float]:
        return [a / b for a, b in zip(values["on"], values["off"], strict=True)]

    return {
        "num_clients": _NUM_CLIENTS,
        "tokens_per_s": {name: asdict(spread_of(values)) for name, values in rates.items()},
        "ratio_on_to_off": asdict(spread_of(pairs(rates))),
        "cpu_s_a_window": {name: asdict(spread_of(values)) for name, values in cpu_s.items()},
        "cpu_ratio_on_to_off": asdict(spread_of(pairs(cpu_s))),
    }


def bench_telemetry() -> dict[str, Any]:
    """Return tokens/s and processor time of both in alternating windows, and their ratios.

    The processor time is the steadier of the two: what other work takes is not in it.
    """
    return asyncio.run(_run())


def _observe_nothing(*_: object) -> None:
    pass


if __name__ == "__main__":
    for observer, method in _OBSERVERS:
        setattr(observer, method, _observe_nothing)
    runpy.run_module("bitwatt", run_name="__main__")
