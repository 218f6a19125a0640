"""The API process's handle on one engine: start, submit, abort; a Supervisor keeps it running."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from bitwatt.engine.messages import (
    Abort,
    EngineConfig,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Ready,
    StepOutputs,
    Submit,
    TokenBytes,
    TokenOutput,
    merged,
)
from bitwatt.engine.supervisor import Supervisor
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError

__all__ = ["EngineClient"]

_MAX_DESCRIBED = 64  # requests, in a line of the log


class _Stream:
    """Outputs of one open request that its reader has not taken yet."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self._outputs: list[TokenOutput] = []
        self._error: RequestFailedError | None = None
        self._changed = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        self.num_tokens += len(output.token_ids)
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
        outputs = list(self._outputs)
        self._outputs.clear()
        return merged(outputs)


class EngineClient:
    """One engine behind one served model name.

    Used from one event loop. submit's iterator must be closed (`aclosing`, or run to its end):
    closing it early aborts the request at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: str = "engine",
        max_queue: int = 256,
        step_timeout_s: float = 120.0,
        load_timeout_s: float = 600.0,
        token_bytes: Callable[[], TokenBytes] | None = None,
        on_ready: Callable[[EngineInfo], None] | None = None,
        on_step: Callable[[StepOutputs], None] | None = None,
        on_down: Callable[[], None] | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        """Prepare the handle; nothing starts before start().

        name            the model's, for the log
        step_timeout_s  an engine silent for longer is killed and restarted
        load_timeout_s  so is one that takes longer until it is ready
        token_bytes     what the engine is told of the tokenizer before its first grammar
        on_ready        called once the engine takes requests, again after every restart
        on_step         called after every step and heartbeat
        on_down         called when an engine process is gone, or could not be started
        on_restart      called when it is started again

        All are called in the event loop, and in this order.
        """
        self._config = config
        self._max_queue = max_queue
        self._token_bytes = token_bytes
        self._knows_tokens = False  # the engine that runs
        self._on_ready = on_ready
        self._on_step = on_step
        self._on_down = on_down
        self._streams: dict[str, _Stream] = {}
        self._kept_places: set[str] = set()  # for requests that are not open yet, by id
        self._stats = EngineStats()
        self._info: EngineInfo | None = None
        self._ready = asyncio.Event()
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(
            name,
            config,
            step_timeout_s=step_timeout_s,
            load_timeout_s=load_timeout_s,
            on_message=self._on_message,
            on_end=self._on_end,
            on_restart=on_restart,
            describe_work=self._describe_work,
        )

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
    def capacity(self) -> int:
        """How many requests may run and wait at once."""
        return self._config.max_num_seqs + self._max_queue

    @property
    def failure(self) -> str | None:
        """Why the engine is down, if it is."""
        return self._failure

    @property
    def process_id(self) -> int | None:
        """The engine process's id while there is one."""
        return self._supervisor.process_id

    @property
    def num_restarts(self) -> int:
        """How often the engine was started again, or was to be."""
        return self._supervisor.num_restarts

    async def start(self) -> None:
        """Start the engine process and its supervision; is_ready turns True later."""
        assert self._task is None, "started twice"
        self._task = asyncio.create_task(self._supervisor.run(), name="engine-supervisor")

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

    @contextmanager
    def places(self, requests: Sequence[Submit]) -> Iterator[None]:
        """Keep a place for each of these requests until it is submitted, or the block ends.

        Raises  QueueFullError, EngineUnavailableError, where not all of them have one
        """
        self._require_places(len(requests))
        names = {request.request_id for request in requests}
        self._kept_places |= names
        try:
            yield
        finally:
            self._kept_places -= names

    async def submit(self, request: Submit) -> AsyncGenerator[TokenOutput, None]:
        """Yield the request's outputs; the last has a finish_reason.

        Outputs that come while the caller is busy are yielded as one.

        Raises  QueueFullError, EngineUnavailableError when first advanced;
                RequestFailedError if the engine dies before the last output
        """
        self._kept_places.discard(request.request_id)
        self._require_places(1)
        stream = _Stream(len(request.prompt_token_ids))
        self._streams[request.request_id] = stream
        if request.sampling.grammar is not None and not self._knows_tokens:
            assert self._token_bytes is not None, "grammars are of a tokenizer's tokens"
            self._knows_tokens = True
            self._supervisor.send(self._token_bytes())
        self._supervisor.send(replace(request, sent_s=time.monotonic()))
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
                self._supervisor.send(Abort([request.request_id]))

    async def stop(self) -> None:
        """End the engine process; open requests raise RequestFailedError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _require_places(self, num_requests: int) -> None:
        if not self.is_ready:
            raise EngineUnavailableError(self._failure or "the engine is loading")
        num_free = self.capacity - len(self._streams) - len(self._kept_places)
        if num_requests > num_free:
            wish = "" if num_requests == 1 else f"{num_free} of {num_requests} places are free: "
            raise QueueFullError(
                f"{wish}{self._config.max_num_seqs} requests run and {self._max_queue} wait; "
                "try again later (--max-num-seqs, --max-queue)"
            )

    def _on_message(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs(outputs=outputs):
                self._stats = message.stats
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
                if self._on_step is not None:
                    self._on_step(message)
            case Ready(info):
                self._info = info
                self._knows_tokens = False
                self._stats = EngineStats()
                self._failure = None
                self._ready.set()
                if self._on_ready is not None:
                    self._on_ready(info)

    def _on_end(self, reason: str) -> None:
        self._ready.clear()
        self._failure = reason
        if self._info is None:
            self._failed.set()
        for stream in self._streams.values():
            stream.fail(RequestFailedError(reason))
        if self._on_down is not None:
            self._on_down()

    def _describe_work(self) -> str:
        """Return the open requests and the last step known, prompts left out."""
        stats = self._stats
        requests = [
            f"{name} ({stream.num_prompt_tokens} prompt tokens, {stream.num_tokens} drawn)"
            for name, stream in self._streams.items()
        ]
        more = len(requests) - _MAX_DESCRIBED
        return (
            f"{len(requests)} requests: {', '.join(requests[:_MAX_DESCRIBED]) or 'none'}"
            f"{f' and {more} more' if more > 0 else ''}; its last step known was its number "
            f"{stats.num_steps}, of {stats.step_tokens} tokens, with {stats.num_running} running, "
            f"{stats.num_waiting} waiting and {stats.num_blocks_used} of {stats.num_blocks} blocks"
        )
