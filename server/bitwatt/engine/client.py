"""The API process's handle on one engine process: start, submit, abort, watch, restart."""

import asyncio
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from bitwatt.engine.environment import engine_environment
from bitwatt.engine.messages import (
    MAX_STEPS_AHEAD,
    Abort,
    EngineConfig,
    EngineInfo,
    Failed,
    Ready,
    StepOutputs,
    Submit,
    ToEngine,
    TokenOutput,
    decode_from_engine,
    encode,
)
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError

__all__ = ["EngineClient"]

_RESTART_DELAY_S = 0.5
_MAX_RESTART_DELAY_S = 30.0
_READ_BURST_S = 0.002


class _Stream:
    """Outputs of one open request that its reader has not taken yet."""

    def __init__(self) -> None:
        self._outputs: deque[TokenOutput] = deque()
        self._error: RequestFailedError | None = None
        self._changed = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        self._changed.set()

    def fail(self, error: RequestFailedError) -> None:
        self._error = error
        self._changed.set()

    async def get(self) -> TokenOutput:
        """Return all that waits, as one output."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        output = self._outputs.popleft()
        return _merge(output, self._outputs) if self._outputs else output


def _merge(first: TokenOutput, rest: deque[TokenOutput]) -> TokenOutput:
    token_ids = list(first.token_ids)
    logprobs = list(first.logprobs)
    last = first
    while rest:
        last = rest.popleft()
        token_ids += last.token_ids
        logprobs += last.logprobs
    return msgspec.structs.replace(last, token_ids=token_ids, logprobs=logprobs)


class EngineClient:
    """One engine behind one served model name.

    Used from one event loop. submit's iterator must be closed (`aclosing`, or run to its end):
    closing it early aborts the request at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int = 256,
        step_timeout_s: float = 120.0,
        on_ready: Callable[[EngineInfo], None] | None = None,
        on_step: Callable[[StepOutputs], None] | None = None,
        on_down: Callable[[], None] | None = None,
    ) -> None:
        """Prepare the handle; nothing starts before start().

        step_timeout_s  an engine silent for longer is killed and restarted
        on_ready        called once the engine takes requests, again after every restart
        on_step         called after every step and heartbeat
        on_down         called when an engine that was ready is gone

        All are called in the event loop, and in this order.
        """
        self._config = config
        self._max_open = config.max_num_seqs + max_queue
        self._max_queue = max_queue
        self._step_timeout_s = step_timeout_s
        self._on_ready = on_ready
        self._on_step = on_step
        self._on_down = on_down
        self._streams: dict[str, _Stream] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._info: EngineInfo | None = None
        self._ready = asyncio.Event()
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._last_message_s = 0.0
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        """What the engine says of itself; None until it was ready once."""
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would be taken."""
        return self._ready.is_set()

    @property
    def is_healthy(self) -> bool:
        """False while an engine that was ready once, or could not start, is down."""
        return self.is_ready or (self._info is None and self._failure is None)

    @property
    def failure(self) -> str | None:
        """Why the engine is down, if it is."""
        return self._failure

    @property
    def process_id(self) -> int | None:
        """The engine process's id while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the engine process and its supervision; is_ready turns True later."""
        assert self._supervisor is None, "started twice"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Return the info once ready, again after a restart.

        Raises  EngineUnavailableError if the engine can't start
        """
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._ready.is_set() or self._info is None:
            raise EngineUnavailableError(self._failure or "the engine is stopped")
        return self._info

    async def submit(self, request: Submit) -> AsyncGenerator[TokenOutput, None]:
        """Yield the request's outputs; the last has a finish_reason.

        Outputs that come while the caller is busy are yielded as one.

        Raises  QueueFullError, EngineUnavailableError when first advanced;
                RequestFailedError if the engine dies before the last output
        """
        if not self.is_ready:
            raise EngineUnavailableError(self._failure or "the engine is loading")
        if len(self._streams) >= self._max_open:
            raise QueueFullError(
                f"{self._config.max_num_seqs} requests run and {self._max_queue} wait; "
                "try again later (--max-num-seqs, --max-queue)"
            )
        stream = _Stream()
        self._streams[request.request_id] = stream
        self._send(request)
        is_open = True
        try:
            while is_open:
                output = await stream.get()
                is_open = output.finish_reason is None
                yield output
        except RequestFailedError:
            is_open = False
            raise
        finally:
            self._streams.pop(request.request_id, None)
            if is_open:
                self._send(Abort([request.request_id]))

    async def stop(self) -> None:
        """End the engine process; open requests raise RequestFailedError."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None

    def _send(self, message: ToEngine) -> None:
        if self._socket is not None:
            # Unbounded and non-blocking: max_queue bounds what can be under way.
            self._socket.send(encode(message))

    async def _supervise(self) -> None:
        delay = _RESTART_DELAY_S
        while True:
            was_ready = await self._run_once()
            if self._info is None:
                return  # it could not start: starting it again would end alike
            delay = _RESTART_DELAY_S if was_ready else min(2 * delay, _MAX_RESTART_DELAY_S)
            await asyncio.sleep(delay)

    async def _run_once(self) -> bool:
        """Run one engine process from start to end; return whether it was ever ready."""
        folder = Path(tempfile.mkdtemp(prefix="bitwatt-"))  # mode 0700
        address = f"ipc://{folder}/engine"
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PAIR)
        was_ready = False
        reason = "the engine was stopped"
        try:
            socket.sndhwm = 0
            socket.rcvhwm = MAX_STEPS_AHEAD
            socket.linger = 0
            socket.bind(address)
            self._socket = socket
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bitwatt.engine.process", address),
                env=engine_environment(),
            )
            self._last_message_s = time.monotonic()
            self._send(self._config)
            reader = asyncio.create_task(self._read(socket))
            exited = asyncio.create_task(self._process.wait())
            watchdog = asyncio.create_task(self._watch())
            tasks = {reader, exited, watchdog}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                was_ready = self.is_ready
                reason = await self._reason(reader, exited, watchdog)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            if self._ready.is_set() and self._on_down is not None:
                self._on_down()
            self._ready.clear()
            self._socket = None
            await self._end_process()
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)
            self._failure = reason
            if self._info is None:
                self._failed.set()
            for stream in self._streams.values():
                stream.fail(RequestFailedError(reason))
        return was_ready

    async def _reason(
        self,
        reader: asyncio.Task[str],
        exited: asyncio.Task[int],
        watchdog: asyncio.Task[str],
    ) -> str:
        if exited.done() and not reader.done():
            # Its last words may still be on the way.
            await asyncio.wait([reader], timeout=0.2)
        if reader.done():
            return reader.result()
        if exited.done():
            return f"the engine process ended with status {exited.result()}"
        return watchdog.result()

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.kill()
        await process.wait()

    async def _read(self, socket: zmq.asyncio.Socket) -> str:
        """Hand out what the engine sends; return why it said it can't start."""
        burst_began_s = time.monotonic()
        while True:
            # Where messages wait, recv() doesn't yield to the event loop: an engine faster than
            # this process would keep it from everything else.
            if time.monotonic() - burst_began_s > _READ_BURST_S:
                await asyncio.sleep(0)
                burst_began_s = time.monotonic()
            message = decode_from_engine(await socket.recv())
            self._last_message_s = time.monotonic()
            match message:
                case StepOutputs(outputs=outputs):
                    for output in outputs:
                        stream = self._streams.get(output.request_id)
                        if stream is not None:
                            stream.put(output)
                    if self._on_step is not None:
                        self._on_step(message)
                case Ready(info):
                    self._info = info
                    self._failure = None
                    self._ready.set()
                    if self._on_ready is not None:
                        self._on_ready(info)
                case Failed(reason):
                    return reason

    async def _watch(self) -> str:
        """Return once an engine that is ready has been silent for too long."""
        while True:
            await asyncio.sleep(self._step_timeout_s / 4)
            silent_s = time.monotonic() - self._last_message_s
            if self.is_ready and silent_s > self._step_timeout_s:
                return (
                    f"the engine made no step for {silent_s:.0f} s; "
                    f"the limit is {self._step_timeout_s:.0f} s (--step-timeout)"
                )
