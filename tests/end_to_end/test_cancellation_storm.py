"""500 requests dropped at random moments, ten times over, leave nothing behind."""

import asyncio
import json
import random
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.extent import TEST_ALL

NUM_REQUESTS = 500
NUM_ROUNDS = 10
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


async def drop(port: int, after_s: float, body: bytes) -> None:
    """Send a request and close the connection after a while, whatever came by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    try:
        async with asyncio.timeout(after_s):
            while await reader.read(4096):
                pass
    except TimeoutError:
        pass
    finally:
        writer.transport.abort()


async def storm(port: int, chance: random.Random) -> None:
    bodies = [
        {
            "model": "builtin",
            "prompt": [chance.randrange(5, 4000) for _ in range(chance.randint(1, 200))],
            "max_tokens": 700,
            "stream": chance.random() < 0.8,
        }
        for _ in range(NUM_REQUESTS)
    ]
    await asyncio.gather(
        *(drop(port, chance.uniform(0.0, 1.0), json.dumps(body).encode()) for body in bodies)
    )


def wait_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if all(server.metric(name, model_name="builtin") == 0 for name in GAUGES):
            return
        time.sleep(0.1)
    raise AssertionError({name: server.metric(name, model_name="builtin") for name in GAUGES})


def rss_anon_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.slow(80)
@pytest.mark.skipif(not TEST_ALL, reason="takes half a minute: BITWATT_TEST_ALL=1 runs it")
def test_500_dropped_requests_leave_gauges_at_zero_and_memory_flat_over_ten_rounds() -> None:
    server = start_server("--no-compare", "--max-queue", "1000")
    try:
        [engine] = server.engine_ids().values()
        chance = random.Random(0)
        port = int(server.url.rsplit(":", 1)[1])
        used: list[int] = []
        for _ in range(NUM_ROUNDS):
            asyncio.run(storm(port, chance))
            wait_idle(server)
            used.append(rss_anon_bytes(engine) + rss_anon_bytes(server.process.pid))
        # The first rounds fill allocators' pools; from then on nothing may pile up.
        growth = max(used[-3:]) / max(used[2:5])
        assert growth < 1.05, [round(used_bytes / 2**20) for used_bytes in used]
        assert server.metric("vllm:prefix_cache_queries_total", model_name="builtin") > 10_000
    finally:
        assert stop_server(server) == 0
