"""A server of our own, started for as long as it is measured."""

import asyncio
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from bitwatt.errors import BitwattError

__all__ = ["ServerStartError", "served"]

_START_S = 120.0


class ServerStartError(BitwattError):
    """It ended, or wasn't ready in time; the message has its last lines."""


@asynccontextmanager
async def served(path: Path, name: str, flags: Sequence[str], weights: str) -> AsyncIterator[str]:
    """Serve a model on a free port of 127.0.0.1; the value is its address once it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bitwatt", "serve", str(path), "--port=0", "--no-compare"),
        *(f"--served-model-name={name}", f"--weights={weights}", "--log-level=info", *flags),
        stderr=PIPE,
    )
    assert process.stderr is not None
    lines: deque[str] = deque(maxlen=20)
    is_ready = asyncio.get_running_loop().create_future()

    async def read() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            lines.append(line.decode(errors="replace"))
            found = re.search(r"models are ready .*(http://127\.0\.0\.1:\d+)", lines[-1])
            if found and not is_ready.done():
                is_ready.set_result(found[1])
        if not is_ready.done():
            is_ready.set_exception(ServerStartError(f"{name} did not start:\n{''.join(lines)}"))

    reader = asyncio.create_task(read())
    try:
        try:
            async with asyncio.timeout(_START_S):
                url = await is_ready
        except TimeoutError as error:
            raise ServerStartError(
                f"{name} was not ready after {_START_S:.0f} s:\n{''.join(lines)}"
            ) from error
        yield url
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()
        await reader
