"""Tries grammars before a request is let in, in a process that ends where one takes too much."""

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import msgspec

from bitwatt.constraints.checker_process import MAX_MEMORY_BYTES, Verdict
from bitwatt.constraints.compiling import TokenBytes, refused
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.errors import EngineUnavailableError, InvalidRequestError

__all__ = ["CHECK_TIME_LIMIT_S", "GrammarChecker"]

CHECK_TIME_LIMIT_S = 1.5  # a schema of 500 properties takes 0.1 s on a Zen 4 core
_START_TIME_LIMIT_S = 30.0
MAX_KEPT = 1024
MAX_KEPT_CHARS = 8 * 1024 * 1024

logger = logging.getLogger(__name__)


class GrammarChecker:
    """The verdicts on one model's grammars. Used from one event loop.

    The process starts with the first grammar, takes one at a time, and is started anew after one
    that it didn't survive. Verdicts are kept: MAX_KEPT, with MAX_KEPT_CHARS of text together.
    """

    def __init__(self, token_bytes: Callable[[], TokenBytes]) -> None:
        self._token_bytes = token_bytes
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._kept: OrderedDict[GrammarSource, Verdict] = OrderedDict()
        self._num_chars = 0

    async def check(self, source: GrammarSource) -> str:
        """Return the grammar as compiling.written_for_matcher gives it.

        Raises  InvalidRequestError where it can't be followed, or takes more than the limits;
                EngineUnavailableError where the process can't be started
        """
        verdict = self._kept.get(source)
        if verdict is None:
            async with self._turn:
                verdict = self._kept.get(source) or await self._try(source)
            self._keep(source, verdict)
        else:
            self._kept.move_to_end(source)
        if verdict.grammar is None:
            raise InvalidRequestError(verdict.refusal or "", param=source.param)
        return verdict.grammar

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            await self._end(self._process)

    async def _try(self, source: GrammarSource) -> Verdict:
        process = self._process or await self._start()
        try:
            answer = await asyncio.wait_for(
                _exchange(process, msgspec.msgpack.encode(source)), CHECK_TIME_LIMIT_S
            )
            return msgspec.msgpack.decode(answer, type=Verdict)
        except TimeoutError:
            told = f"it takes more than {CHECK_TIME_LIMIT_S} s to compile, which is the limit"
        except (asyncio.IncompleteReadError, OSError):
            told = (
                f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB or is too deep to compile; "
                "that is the limit"
            )
        except BaseException:  # the caller went away, and an answer would be another's
            await self._end(process)
            raise
        await self._end(process)
        return Verdict(refusal=str(refused(source, told)))

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bitwatt.constraints.checker_process"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        tokens = msgspec.msgpack.encode(self._token_bytes())
        try:
            await asyncio.wait_for(_exchange(process, tokens), _START_TIME_LIMIT_S)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            logger.exception("the process that tries grammars can't be started")
            await self._end(process)
            raise EngineUnavailableError("grammars can't be tried now; try again") from None
        except BaseException:
            await self._end(process)
            raise
        return process

    async def _end(self, process: Process) -> None:
        if self._process is process:
            self._process = None
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()  # reads to the end, and so closes the pipes

    def _keep(self, source: GrammarSource, verdict: Verdict) -> None:
        if source in self._kept:
            return
        self._kept[source] = verdict
        self._num_chars += _num_chars(source, verdict)
        while len(self._kept) > MAX_KEPT or self._num_chars > MAX_KEPT_CHARS:
            self._num_chars -= _num_chars(*self._kept.popitem(last=False))


def _num_chars(source: GrammarSource, verdict: Verdict) -> int:
    return len(source.text) + len(verdict.grammar or "") + len(verdict.refusal or "")


async def _exchange(process: Process, data: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(len(data).to_bytes(4, "little") + data)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    return await process.stdout.readexactly(size)
