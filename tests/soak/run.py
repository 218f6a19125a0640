"""Epochs of mixed traffic and accidents; when each has ended, everything must add up."""

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.soak.callers import Ledger, call_for_ever

__all__ = ["Report", "soak"]

MODELS = {"builtin": "wild", "builtin-twin": "calm"}
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
IDLE_S = 60.0
_FILLED = 3  # epochs in which allocators' pools fill
_MIB = 2**20


@dataclass
class Report:
    """What a soak brought.

    faults   what no server may do, one line each; empty when all is well
    counted  by model: choices and tokens that the server's counters have and that callers read,
             choices that callers gave up, which the server may have ended in any way
    longest_s, largest_gap_s  by model: of a request; without a byte from the server
    rss      MiB of RssAnon after each epoch, of the API process and the calm model's engine, by
             server: each restart of the whole begins a new one; rss_at_s has when
    """

    seconds: float = 0.0
    epochs: int = 0
    engine_kills: int = 0
    server_stops: int = 0
    requests: int = 0
    tokens: int = 0
    callers: int = 0
    ends: dict[str, dict[str, int]] = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)
    longest_s: dict[str, float] = field(default_factory=dict)
    largest_gap_s: dict[str, float] = field(default_factory=dict)
    rss_at_s: list[list[float]] = field(default_factory=list)
    rss_api_mib: list[list[float]] = field(default_factory=list)
    rss_engine_mib: list[list[float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return vars(self)


def soak(
    seconds: float,
    *,
    epoch_s: float = 20.0,
    epochs_per_server: int = 6,
    num_callers: int = 12,
    think_s: float = 0.2,
    seed: int = 0,
    report: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Return what so many seconds of traffic and accidents brought.

    epoch_s            of traffic, after which all must come to rest and add up
    epochs_per_server  after which the server is stopped, in the middle of traffic, and started
    num_callers        of each model, one request at a time each
    think_s            mean pause between a caller's requests
    """
    chance = random.Random(seed)
    found = Report(callers=num_callers * len(MODELS))
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        flags = ("--max-queue", "64", "--drain-timeout", "20")
        server = start_server(*flags, has_all_cores=True)
        found.rss_at_s.append([])
        found.rss_api_mib.append([])
        found.rss_engine_mib.append([])
        ledgers = {model: Ledger() for model in MODELS}
        counted: dict[str, dict[str, int]] = {}
        try:
            calm_engine = _calm_engine(server)
            for epoch in range(epochs_per_server):
                left = seconds - (time.monotonic() - started)
                if epoch == 0:  # whole, however long the server took to start
                    left = epoch_s
                elif left <= 0:
                    break
                asyncio.run(
                    _epoch(server, ledgers, min(epoch_s, left), num_callers, think_s, chance, found)
                )
                counted = _check(server, ledgers, found)
                found.rss_at_s[-1].append(time.monotonic() - started)
                found.rss_api_mib[-1].append(_rss_mib(server.process.pid))
                found.rss_engine_mib[-1].append(_rss_mib(calm_engine))
                report(_line(found, ledgers))
            asyncio.run(_stop_under_traffic(server, ledgers, num_callers, think_s, chance))
        finally:
            status = server.process.poll()
            status = stop_server(server) if status is None else status
        found.server_stops += 1
        found.faults += [f"{m}: {fault}" for m, one in ledgers.items() for fault in one.faults]
        if status != 0:
            found.faults.append(f"the server ended with status {status}")
        _total(found, ledgers, counted)
    found.seconds = time.monotonic() - started
    for series in (found.rss_api_mib, found.rss_engine_mib):
        _check_flat(series, found)
    found.faults = list(dict.fromkeys(found.faults))
    return found


async def _epoch(
    server: Server,
    ledgers: dict[str, Ledger],
    seconds: float,
    num_callers: int,
    think_s: float,
    chance: random.Random,
    found: Report,
) -> None:
    tasks = _call(server, ledgers, num_callers, think_s, chance)
    killer = asyncio.create_task(_kill_engines(server, chance, seconds, found))
    await asyncio.sleep(seconds)
    for task in (killer, *tasks):
        task.cancel()
    await asyncio.gather(killer, *tasks, return_exceptions=True)
    found.epochs += 1


async def _stop_under_traffic(
    server: Server,
    ledgers: dict[str, Ledger],
    num_callers: int,
    think_s: float,
    chance: random.Random,
) -> None:
    """Tell the server to end while callers ask: what is open ends, what comes later is refused."""
    tasks = _call(server, ledgers, num_callers, think_s, chance)
    await asyncio.sleep(2.0)
    for ledger in ledgers.values():
        ledger.is_stopping = True
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _call(
    server: Server,
    ledgers: dict[str, Ledger],
    num_callers: int,
    think_s: float,
    chance: random.Random,
) -> list[asyncio.Task[None]]:
    port = int(server.url.rsplit(":", 1)[1])
    return [
        asyncio.create_task(
            call_for_ever(
                port, model, kind, ledgers[model], random.Random(chance.random()), think_s
            )
        )
        for model, kind in MODELS.items()
        for _ in range(num_callers)
    ]


async def _kill_engines(
    server: Server, chance: random.Random, seconds: float, found: Report
) -> None:
    """Kill the wild model's engine now and then, twice an epoch at the most."""
    while True:
        await asyncio.sleep(chance.uniform(0.3, 0.7) * seconds)
        for pid in server.engine_ids().values():
            if _weights(pid) == "wild":
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    found.engine_kills += 1


def _engines(server: Server) -> list[int]:
    return sorted(server.engine_ids().values())


_calm: set[int] = set()


def _calm_engine(server: Server) -> int:
    """Return the process of the model that nothing happens to: the second that was started."""
    [_, second] = _engines(server)
    _calm.clear()
    _calm.add(second)
    return second


def _weights(pid: int) -> str:
    return "calm" if pid in _calm else "wild"


def _check(server: Server, ledgers: dict[str, Ledger], found: Report) -> dict[str, dict[str, int]]:
    """Wait for rest; return what server and callers counted by model, once they are compared."""
    server.wait_ready(IDLE_S)
    deadline = time.monotonic() + IDLE_S
    up: dict[str, float] = {}
    while time.monotonic() < deadline:
        up = {
            f"{name} of {model}": value
            for name in GAUGES
            for model in MODELS
            if (value := server.metric(name, model_name=model))
        }
        if not up:
            break
        time.sleep(0.1)
    found.faults += [f"{name} stays at {value}" for name, value in up.items()]
    both: dict[str, dict[str, int]] = {}
    for model, ledger in ledgers.items():
        counted = {
            reason: server.metric(
                "vllm:request_success_total", model_name=model, finished_reason=reason
            )
            for reason in ("stop", "length", "abort", "error")
        }
        tokens = server.metric("vllm:request_generation_tokens_sum", model_name=model)
        whole = counted["stop"] + counted["length"]
        both[model] = {
            "choices": int(whole),
            "choices_read": ledger.choices,
            "choices_given_up": ledger.mid_choices,
            "tokens": int(tokens),
            "tokens_read": ledger.tokens,
        }
        # What was dropped or broke off may have ended on the server, in any way, or never begun.
        if not ledger.choices <= whole <= ledger.choices + ledger.mid_choices:
            found.faults.append(
                f"{model}: the server ended {whole:.0f} choices, callers read {ledger.choices} "
                f"and gave {ledger.mid_choices} up"
            )
        if sum(counted.values()) > ledger.choices + ledger.mid_choices:
            found.faults.append(f"{model}: choices ended twice: {counted} against {ledger}")
        if tokens < ledger.tokens or (not ledger.mid_choices and tokens != ledger.tokens):
            found.faults.append(
                f"{model}: the server counts {tokens:.0f} tokens, callers {ledger.tokens}"
            )
        found.faults += [f"{model}: {fault}" for fault in ledger.faults]
        ledger.faults.clear()
        if ledger.num_open:
            found.faults.append(f"{model}: {ledger.num_open} requests never ended")
    return both


def _check_flat(series: list[list[float]], found: Report) -> None:
    """Compare the last epochs of a server with those after the pools had filled."""
    for epochs in series:
        if len(epochs) < 2 * _FILLED:
            continue
        filled, last = epochs[_FILLED - 1 : -_FILLED] or epochs[:1], epochs[-_FILLED:]
        before, after = statistics.median(filled), statistics.median(last)
        if after > max(1.1 * before, before + 16):
            found.faults.append(
                f"RssAnon grew from {before:.0f} to {after:.0f} MiB: "
                + ", ".join(f"{mib:.0f}" for mib in epochs)
            )


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / _MIB
    raise AssertionError("no RssAnon")


def _total(found: Report, ledgers: dict[str, Ledger], counted: dict[str, dict[str, int]]) -> None:
    """Add what one server brought."""
    for model, figures in counted.items():
        sums = found.counted.setdefault(model, dict.fromkeys(figures, 0))
        for name, number in figures.items():
            sums[name] += number
    for model, ledger in ledgers.items():
        for longest, seconds in (
            (found.longest_s, ledger.longest_s),
            (found.largest_gap_s, ledger.largest_gap_s),
        ):
            longest[model] = max(longest.get(model, 0.0), seconds)
        ends = found.ends.setdefault(model, {})
        for end, number in ledger.ends.items():
            ends[end] = ends.get(end, 0) + number
        found.requests += ledger.num_ended
        found.tokens += ledger.tokens


def _line(found: Report, ledgers: dict[str, Ledger]) -> str:
    ends = "; ".join(f"{model}: {dict(ledger.ends)}" for model, ledger in ledgers.items())
    return (
        f"epoch {found.epochs}, {found.engine_kills} kills, API "
        f"{found.rss_api_mib[-1][-1]:.0f} MiB, engine {found.rss_engine_mib[-1][-1]:.0f} MiB, "
        f"{len(found.faults)} faults; {ends}"
    )
