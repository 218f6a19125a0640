"""Keeps one engine process running: starts it, watches it, and starts it again whatever happens."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import zmq
import zmq.asyncio

from bitwatt.engine.environment import engine_environment
from bitwatt.engine.messages import (
    MAX_STEPS_AHEAD,
    EngineConfig,
    EngineMessage,
    Failed,
    Ready,
    ToEngine,
    decode_from_engine,
    encode,
)
from bitwatt.engine.process_log import EngineLog
from bitwatt.engine.socket_folder import socket_folder

__all__ = ["Backoff", "Supervisor"]

_LAST_MESSAGES_S = 0.2
_READ_BURST_S = 0.002
_FREE_DESCRIPTORS = 32  # libzmq aborts the process where some of its own can't be had

logger = logging.getLogger(__name__)


class Backoff:
    """How long to wait between an engine's end and its next start.

    Doubles from 0.5 s to 20 s, so that an engine which takes some seconds to load serves again
    within 30 s of the cause's end; begins anew after an engine that was ready for a minute.
    """

    _FIRST_S = 0.5
    _LONGEST_S = 20.0
    _STABLE_S = 60.0

    def __init__(self) -> None:
        self.num_ends = 0  # in a row

    def next_s(self, ready_s: float) -> float:
        """Return the delay after an engine that was ready for so long, 0 for one that never was."""
        self.num_ends = 1 if ready_s >= self._STABLE_S else self.num_ends + 1
        return min(self._FIRST_S * 2.0 ** min(self.num_ends - 1, 30), self._LONGEST_S)


class Supervisor:
    """One engine, over as many processes as it takes. Used from one event loop."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        *,
        step_timeout_s: float,
        load_timeout_s: float,
        on_message: Callable[[EngineMessage], None],
        on_end: Callable[[str], None],
        on_restart: Callable[[], None] | None,
        describe_work: Callable[[], str],
    ) -> None:
        """Prepare; nothing starts before run().

        name            the model's, for the log
        on_message      takes every message of the engine
        on_end          takes why a process ended, or could not be started
        on_restart      called when a process is started again
        describe_work   says what runs, for the log to tell what an engine died of
        """
        self.num_restarts = 0
        self._name = name
        self._config = config
        self._step_timeout_s = step_timeout_s
        self._load_timeout_s = load_timeout_s
        self._on_message = on_message
        self._on_end = on_end
        self._on_restart = on_restart
        self._describe_work = describe_work
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._num_messages = 0
        self._ready_at_s: float | None = None  # of the process that runs
        self._was_ready = False  # any process

    @property
    def process_id(self) -> int | None:
        """The engine process's id while there is one."""
        return self._process.pid if self._process is not None else None

    def send(self, message: ToEngine) -> None:
        """Send the engine a message; what no engine takes is lost, and its end is told."""
        if self._socket is not None:
            # Unbounded and non-blocking: max_queue bounds what can be under way.
            self._socket.send(encode(message))

    async def run(self) -> None:
        """Run the engine for ever; return only if it has never been ready when it first ends.

        One that could not start at first would end alike again, and its reason is told at once.
        """
        backoff = Backoff()
        # One for all processes: to make another without file descriptors left would abort.
        self._context = zmq.asyncio.Context()
        try:
            while True:
                started_s = time.monotonic()
                reason = await self._run_to_its_end()
                if not self._was_ready:
                    return
                ready_s = 0.0 if self._ready_at_s is None else time.monotonic() - self._ready_at_s
                delay_s = backoff.next_s(ready_s)
                in_a_row = f" ({backoff.num_ends} ends in a row)" if backoff.num_ends > 1 else ""
                work = f"; it ran {self._describe_work()}" if ready_s else ""
                logger.error(
                    "the engine of %s is down after %.1f s: %s; it is started again in %.1f s%s%s",
                    self._name,
                    time.monotonic() - started_s,
                    reason,
                    delay_s,
                    in_a_row,
                    work,
                )
                await asyncio.sleep(delay_s)
                self.num_restarts += 1
                if self._on_restart is not None:
                    self._on_restart()
                logger.info(
                    "the engine of %s is started again, restart %d", self._name, self.num_restarts
                )
        finally:
            self._context.destroy(linger=0)

    async def _run_to_its_end(self) -> str:
        """Run one process; return why it ended or can't be started."""
        reason = "the engine was stopped"
        try:
            reason = await self._run_once()
        except (OSError, zmq.ZMQError) as error:
            reason = f"its process can't be started: {error}"
        except Exception as error:
            logger.exception("the supervision of %s met what it doesn't know", self._name)
            reason = f"its process can't be supervised: {error!r}"
        finally:
            self._on_end(reason)
        return reason

    async def _run_once(self) -> str:
        assert self._context is not None
        self._ready_at_s = None
        _require_free_descriptors()
        with ExitStack() as stack:
            address = f"ipc://{stack.enter_context(socket_folder())}/engine"
            socket = stack.enter_context(self._context.socket(zmq.PAIR))
            socket.sndhwm = 0
            socket.rcvhwm = MAX_STEPS_AHEAD
            socket.linger = 0
            socket.bind(address)
            log = stack.enter_context(EngineLog(self._name))
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "bitwatt.engine.process", address, str(os.getpid())),
                    stderr=log.writable,
                    env=engine_environment(),
                )
                log.close_writable()
                self._socket = socket
                self.send(self._config)
                return await self._watch_process(self._process, socket)
            finally:
                self._socket = None
                await self._end_process()

    async def _watch_process(
        self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket
    ) -> str:
        """Return why the process ended, or is to be ended."""
        reader = asyncio.create_task(self._read(socket))
        exited = asyncio.create_task(process.wait())
        watchdog = asyncio.create_task(self._watch())
        tasks = {reader, exited, watchdog}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            num_read = -1
            while exited.done() and not reader.done() and num_read != self._num_messages:
                # What it computed may still be on the way.
                num_read = self._num_messages
                await asyncio.wait([reader], timeout=_LAST_MESSAGES_S)
            if reader.done():
                return reader.result()
            return _describe_exit(exited.result()) if exited.done() else watchdog.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.kill()
        await process.wait()

    async def _read(self, socket: zmq.asyncio.Socket) -> str:
        """Hand on what the engine sends; return why it said it can't go on."""
        burst_began_s = time.monotonic()
        while True:
            # Where messages wait, recv() doesn't yield to the event loop: an engine faster than
            # this process would keep it from everything else.
            if time.monotonic() - burst_began_s > _READ_BURST_S:
                await asyncio.sleep(0)
                burst_began_s = time.monotonic()
            message = decode_from_engine(await socket.recv())
            self._num_messages += 1
            if isinstance(message, Failed):
                return message.message
            if isinstance(message, Ready):
                self._ready_at_s = time.monotonic()
                if self._was_ready:
                    logger.info(
                        "the engine of %s serves again, loaded in %.1f s",
                        self._name,
                        message.info.load_s,
                    )
                self._was_ready = True
            self._on_message(message)

    async def _watch(self) -> str:
        """Return once the engine has been silent, or has loaded, for too long.

        Time is counted by this process's own ticks, each of which lets the messages that wait be
        read: while this process is stopped or busy, nobody's silence grows.
        """
        tick_s = min(1.0, self._step_timeout_s / 8)
        silent_s = loading_s = 0.0
        while True:
            num_messages = self._num_messages
            await asyncio.sleep(tick_s)
            if self._ready_at_s is None:
                loading_s += tick_s
                if loading_s > self._load_timeout_s:
                    return (
                        f"the engine has not loaded within {self._load_timeout_s:.0f} s "
                        "(--load-timeout)"
                    )
                continue
            silent_s = 0.0 if self._num_messages > num_messages else silent_s + tick_s
            if silent_s > self._step_timeout_s:
                return (
                    f"the engine made no step for {silent_s:.0f} s; "
                    f"the limit is {self._step_timeout_s:.0f} s (--step-timeout)"
                )


def _describe_exit(status: int) -> str:
    ended = f"the engine process ended with status {status}"
    try:
        return f"{ended} ({signal.Signals(-status).name})"
    except ValueError:
        return ended


def _require_free_descriptors() -> None:
    """Raise OSError unless a process and its socket can have the file descriptors they take."""
    taken: list[int] = []
    try:
        taken.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(_FREE_DESCRIPTORS))
    finally:
        for descriptor in taken:
            os.close(descriptor)
