"""What hostile callers cost the others: a stream's largest gap, and the API process's memory.

A real server over the embedded model; server, engine and callers share the machine's cores.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitwatt import builtin
from bitwatt.bench.serving import Server, serve

__all__ = ["bench_hostile"]

_BODY_BYTES = 2_000_000
_MAX_BODY_BYTES = 1 << 21  # --max-body-bytes as it is by default
_NUM_CONNECTIONS = 4
_TRAILERS_BYTES = 200 << 20  # of all connections
_PIECE = b"a:b\r\n" * 4000
_LOOK_EVERY_S = 0.01


def _filled(start: bytes, entry: Callable[[int], bytes], end: bytes) -> bytes:
    """Return as many entries as fit into a body."""
    entries: list[bytes] = []
    size = len(start) + len(end)
    while size < _BODY_BYTES:
        entries.append(entry(len(entries)))
        size += len(entries[-1]) + 1
    return start + b",".join(entries) + end


def _bodies() -> list[tuple[str, bytes]]:
    """Return eight, and where each goes: every one is refused, and long to look through."""
    ids = _filled(b'{"model":"bench","tokens":[', lambda _: b"-1", b"]}")
    fields = _filled(b'{"model":"bench","prompt":"x",', lambda i: b'"f%d":0' % i, b"}")
    messages = _filled(b'{"model":"bench","messages":[', lambda _: b'{"role":1}', b"]}")
    biases = _filled(
        b'{"model":"bench","prompt":"x","logit_bias":{', lambda i: b'"%d":"x"' % i, b"}}"
    )
    prompts = _filled(b'{"model":"bench","prompt":[', lambda _: b"[-1]", b"]}")
    return [
        ("/detokenize", ids),
        ("/detokenize", ids),
        ("/v1/completions", fields),
        ("/v1/chat/completions", fields),
        ("/v1/chat/completions", messages),
        ("/v1/completions", biases),
        ("/v1/completions", prompts),
        ("/tokenize", messages),
    ]


async def _post(port: int, path: str, body: bytes) -> int:
    """Return the status of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_head(path, f"Content-Length: {len(body)}") + body)
        return int((await reader.read()).split(b" ", 2)[1])
    finally:
        writer.close()


def _head(path: str, framing: str) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\n{framing}\r\n\r\n"
    ).encode()


async def _largest_gap_s(port: int, beside: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time between two pieces of a stream while something runs beside it."""
    body = json.dumps(
        {"model": "bench", "prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True}
    ).encode()
    largest_s = 0.0
    began = asyncio.Event()
    is_over = False

    async def watch() -> None:
        nonlocal largest_s
        while not is_over:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_head("/v1/completions", f"Content-Length: {len(body)}") + body)
            last_s = None
            while await reader.read(1 << 16):
                now_s = time.perf_counter()
                if last_s is not None and began.is_set():
                    largest_s = max(largest_s, now_s - last_s)
                last_s = now_s
                began.set()
            writer.close()

    watching = asyncio.create_task(watch())
    await began.wait()
    await beside()
    is_over = True
    await watching
    return largest_s


async def _send_trailers(port: int) -> int:
    """Return the bytes of trailers that a connection took before it was closed."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    num_bytes = 0
    with suppress(OSError):
        writer.write(_head("/tokenize", "Transfer-Encoding: chunked") + b"1\r\n \r\n0\r\n")
        while num_bytes < _TRAILERS_BYTES // _NUM_CONNECTIONS:
            writer.write(_PIECE)
            await writer.drain()
            num_bytes += len(_PIECE)
    writer.transport.abort()
    return num_bytes


def _rss_anon_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's memory")


async def _measure_trailers(server: Server) -> dict[str, int]:
    before = most = _rss_anon_bytes(server.pid)

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, _rss_anon_bytes(server.pid))
            await asyncio.sleep(_LOOK_EVERY_S)

    looking = asyncio.create_task(look())
    num_bytes = await asyncio.gather(
        *(_send_trailers(server.port) for _ in range(_NUM_CONNECTIONS))
    )
    await asyncio.sleep(0.5)
    looking.cancel()
    return {
        "sent_bytes": sum(num_bytes),
        "rss_anon_growth_bytes": most - before,
    }


async def _run() -> dict[str, Any]:
    bodies = _bodies()
    assert all(len(body) <= _MAX_BODY_BYTES for _, body in bodies)
    statuses: list[int] = []

    async with serve(builtin.TERNARY, "--no-compare") as server:
        port = server.port

        async def refuse() -> None:
            statuses[:] = await asyncio.gather(*(_post(port, *body) for body in bodies))

        await refuse()  # warm-up
        quiet_s = await _largest_gap_s(port, lambda: asyncio.sleep(2))
        gaps = [await _largest_gap_s(port, refuse) for _ in range(5)]
        return {
            "largest_gap_s": max(gaps),
            "largest_gap_s_alone": quiet_s,
            "statuses": statuses,
            "trailers": await _measure_trailers(server),
        }


def bench_hostile() -> dict[str, Any]:
    """Return a stream's largest gap beside eight 2 MB bodies, and what 200 MiB of trailers take.

    The server reads on for a while after it has refused, so that its answer arrives; on a busy
    machine fewer trailers than 200 MiB may be taken, as sent_bytes says.
    """
    return asyncio.run(_run())
