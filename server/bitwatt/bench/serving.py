"""What serving itself costs: a real server over the fake model, read by real sockets.

Server, engine and clients share the machine's cores, as they would not in production.
"""

import asyncio
import json
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwatt import builtin
from bitwatt.bench.measure import spread_of

__all__ = ["BITWATT", "Server", "bench_serving", "request", "serve", "tokens_per_s"]

BITWATT = "bitwatt"

_NUM_CLIENTS = 64
_MAX_TOKENS = 1500
_NUM_PROBES = 100


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the processor seconds that its processes have used; Linux only."""
        children = Path(f"/proc/{self.pid}/task").glob("*/children")
        pids = [self.pid, *(int(pid) for path in children for pid in path.read_text().split())]
        ticks = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def serve(path: Path, *flags: str, program: str = BITWATT) -> AsyncIterator[Server]:
    """Run `bitwatt serve` on a free port.

    program  the module run in its place
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", program, "serve", str(path), "--port", "0"),
        *("--served-model-name", "bench", *flags),
        stderr=PIPE,
    )
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    log = asyncio.create_task(_read_log(process, port))
    try:
        server = Server(await asyncio.wait_for(port, 60), process.pid)
        while b" 200 " not in await request(server.port, "GET", "/ready"):
            await asyncio.sleep(0.1)
        yield server
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await log
        await process.wait()


async def _read_log(process: Process, port: asyncio.Future[int]) -> None:
    """Tell the port, and read on: a server whose log nobody reads stands still in the end."""
    assert process.stderr is not None
    async for line in process.stderr:
        found = re.search(rb"http://127\.0\.0\.1:(\d+)", line)
        if found and not port.done():
            port.set_result(int(found.group(1)))
    if not port.done():
        port.set_exception(RuntimeError("the server ended before it listened"))


async def request(
    port: int, method: str, path: str, body: object = None, *, is_mirrored: bool = False
) -> bytes:
    """Return the whole response of one connection, headers too."""
    reader, writer = await _open(port, method, path, body, is_mirrored=is_mirrored)
    try:
        return await reader.read()
    finally:
        writer.close()


async def _open(
    port: int, method: str, path: str, body: object, *, is_mirrored: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    data = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"X-Bitwatt-Shadow: {is_mirrored:d}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return reader, writer


def _completion(max_tokens: int) -> dict[str, Any]:
    return {
        "model": "bench",
        "prompt": "def main():",
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


async def tokens_per_s(
    port: int, num_clients: int, max_tokens: int, *, is_mirrored: bool = False
) -> float:
    """Return the rate at which so many streams at once bring max_tokens each."""
    started = time.perf_counter()
    responses = await asyncio.gather(
        *(
            request(
                port,
                "POST",
                "/v1/completions",
                _completion(max_tokens),
                is_mirrored=is_mirrored,
            )
            for _ in range(num_clients)
        )
    )
    seconds = time.perf_counter() - started
    counts = [re.findall(rb'"completion_tokens":(\d+)', response) for response in responses]
    return sum(int(count[-1]) for count in counts) / seconds


async def _ttft_ms(port: int) -> float:
    started = time.perf_counter()
    reader, writer = await _open(port, "POST", "/v1/completions", _completion(1))
    try:
        await reader.readuntil(b"data: ")
        return 1e3 * (time.perf_counter() - started)
    finally:
        writer.close()


async def _run() -> dict[str, Any]:
    flags = ("--backend", "fake", "--max-num-seqs", str(_NUM_CLIENTS), "--log-level", "info")
    async with serve(builtin.TERNARY, *flags) as server:
        port = server.port
        await tokens_per_s(port, _NUM_CLIENTS, _MAX_TOKENS)  # warm-up
        rates = [await tokens_per_s(port, _NUM_CLIENTS, _MAX_TOKENS) for _ in range(5)]
        probes = [await _ttft_ms(port) for _ in range(_NUM_PROBES)][10:]
    return {
        "num_clients": _NUM_CLIENTS,
        "streamed_tokens_per_s": asdict(spread_of(rates)),
        "ttft_ms_at_idle": asdict(spread_of(probes)),
        "num_cpus_shared_with_clients": len(os.sched_getaffinity(0)),
    }


def bench_serving() -> dict[str, Any]:
    """Return tokens/s streamed and detokenized to 64 clients, and the TTFT of a lone request."""
    return asyncio.run(_run())
