"""The twin that another bitwatt server serves: its figures, its callers, and its answers.

That server is asked over HTTP with a key of its own. Nothing is asked of it but its state, and what
the page and mirrors ask; where it is down, this server serves on.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from bitwatt.errors import BitwattError, EngineUnavailableError, RequestFailedError, shorten
from bitwatt.serving.models import Callers, ServedModel
from bitwatt.serving.state import ComparisonState, ModelSide, TwinLink, aligned
from bitwatt.serving.twins import Answer, Asked, Device, Posted
from bitwatt.serving.usage import Usage

__all__ = ["RemoteTwin"]

_STATE_PATH = "/bitwatt/v1/comparison"
_STATE_TIMEOUT_S = 2.0
_CONNECT_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.25  # while mirrors wait
_WATCH_EVERY_S = 0.1  # while one runs
_SETTLE_S = 1.0  # that server doesn't say when it has given up
_EXTRA_HISTORY_S = 2.0

# What a mirror's answer needs not, or a caller may not ask.
_UNASKED = ("priority", "echo", "logprobs", "top_logprobs", "prompt_logprobs")

logger = logging.getLogger(__name__)


class RemoteTwin:
    """The last model of another server that isn't named like one of this server's.

    Used from one event loop. Meets serving.twins.Twin.
    """

    def __init__(self, url: str, *, key: str | None, own_names: Collection[str]) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.callers = Callers()
        self._own_names = own_names
        headers = {"X-Bitwatt-Shadow": "0"}  # a mirror has no mirror
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False)
        self._name = self.url  # until it has said
        self._side: ModelSide | None = None
        self._problem: str | None = "it was not asked yet"
        self._looked_s = 0.0
        self._num_mirrored = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> Device | None:
        info = None if self._side is None else self._side.engine
        return None if info is None else (info.device, info.device_uuid)

    def has_vocabulary_of(self, model: ServedModel) -> bool:  # noqa: ARG002
        return True  # for all that is known

    @property
    def link(self) -> TwinLink:
        """Which server it is, and why nothing is known of it, if so."""
        return TwinLink(url=self.url, problem=self._problem)

    async def look(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            await self._ask_state(time.time())

    async def side(self, since_s: float, times_s: list[float]) -> ModelSide | None:
        """Return its figures, with points at these times; None where link says why."""
        state = await self._ask_state(max(0.0, since_s - _EXTRA_HISTORY_S))
        if state is None or self._side is None:
            return None
        return msgspec.structs.replace(
            self._side,
            is_remote=True,
            history=aligned(self._side.history, state.time_s, times_s),
        )

    async def _ask_state(self, since_s: float) -> ComparisonState | None:
        self._looked_s = time.monotonic()
        try:
            async with asyncio.timeout(_STATE_TIMEOUT_S):
                response = await self._http.get(
                    self.url + _STATE_PATH, params={"since": since_s, "own": "true"}
                )
            if response.status_code != 200:
                raise _refusal(response.status_code, response.content)
            state = msgspec.json.decode(response.content, type=ComparisonState)
        except TimeoutError:
            self._lose(f"it didn't answer within {_STATE_TIMEOUT_S:g} s")
        except msgspec.DecodeError:
            self._lose(f"its {_STATE_PATH} is none of this version of bitwatt")
        except httpx.HTTPError as error:
            self._lose(f"it can't be reached: {error}")
        except (BitwattError, httpx.InvalidURL) as error:
            self._lose(str(error))
        else:
            sides = [side for side in state.models if side.name not in self._own_names]
            if sides:
                self._see(sides[-1])
                return state
            self._lose("its models are named as this server's (--served-model-name)")
        return None

    def _see(self, side: ModelSide) -> None:
        self._name, self._side, self._problem = side.name, side, None
        num_open = max(0, side.num_open - self._num_mirrored)
        while self.callers.num_open < num_open:
            self.callers.arrive()
        while self.callers.num_open > num_open:
            self.callers.leave()
        if side.quiet_s is not None and not num_open:
            self.callers.left_s = time.monotonic() - side.quiet_s

    def _lose(self, problem: str) -> None:
        if self._problem != problem:
            logger.warning("the twin at %s: %s", self.url, problem)
        self._side, self._problem = None, problem

    @asynccontextmanager
    async def post(self, posted: Posted) -> AsyncGenerator[httpx.Response, None]:
        """Ask it what was asked here; the value is its answer, to be read while the block runs.

        Raises  EngineUnavailableError where it can't be reached, or breaks off
        """
        try:
            async with self._http.stream(
                "POST",
                self.url + posted.path,
                content=posted.body,
                headers={"Content-Type": "application/json"},
            ) as response:
                yield response
        except httpx.HTTPError as error:
            raise EngineUnavailableError(f"the twin at {self.url} fails: {error}") from error

    async def answer(self, asked: Asked) -> Answer:
        body = msgspec.json.decode(asked.posted.body, type=dict[str, Any])
        body = {name: value for name, value in body.items() if name not in _UNASKED}
        body |= {
            "model": self.name,
            "seed": asked.request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        posted = Posted(asked.posted.path, msgspec.json.encode(body))
        watcher = asyncio.create_task(self._watch())
        self._num_mirrored = asked.num_choices
        try:
            answer = Answer()
            async with self.post(posted) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        _take(answer, line.removeprefix("data: "))
            if answer.usage is None:
                raise RequestFailedError(f"the twin at {self.url} broke off")
            return answer
        finally:
            self._num_mirrored = 0
            watcher.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            await self._ask_state(time.time())

    async def settle(self) -> None:
        await asyncio.sleep(_SETTLE_S)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()


def _take(answer: Answer, data: str) -> None:
    """Add an event of a stream; raises RequestFailedError for an error, or for no sense."""
    try:
        event = msgspec.json.decode(data, type=dict[str, Any])
        if "error" in event:
            raise RequestFailedError(str(event["error"]["message"]))
        for choice in event["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text or choice["finish_reason"] is not None:
                answer.take(choice["index"], text or "")
        if event.get("usage") is not None:
            answer.usage = msgspec.convert(event["usage"], Usage)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise RequestFailedError(f"the twin's answer makes no sense: {shorten(data)}") from error


def _refusal(status: int, content: bytes) -> RequestFailedError:
    try:
        said = msgspec.json.decode(content)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        said = "no word why"
    hint = " (--twin-key-file)" if status == 401 else ""
    return RequestFailedError(f"it answered {status}{hint}: {shorten(said)}")
