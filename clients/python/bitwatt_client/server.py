"""One model of an OpenAI-compatible server, called and timed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from bitwatt_client.errors import ClientError, ServerError, StreamError
from bitwatt_client.events import Chunk, read_comment, read_event
from bitwatt_client.exposition import Samples, parse_samples

__all__ = [
    "Answer",
    "Message",
    "ModelCard",
    "Roofline",
    "Server",
    "mean_tpot_s",
    "new_http_client",
    "whole_answer",
]

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model as a server lists it; None where that doesn't say."""

    name: str
    max_model_len: int | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A streamed answer and its times, in seconds of one monotonic clock.

    num_tokens     generated, as the server counted them
    text_times_s   when each chunk that has text, thinking or the end was read
    energy_joules, energy_reason, cost_usd  as the server told them; None where it told none
    """

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: str | None
    started_s: float
    text_times_s: tuple[float, ...]
    energy_joules: float | None = None
    energy_reason: str | None = None
    cost_usd: float | None = None

    @property
    def ttft_s(self) -> float:
        """From the request to the first text."""
        return self.text_times_s[0] - self.started_s

    @property
    def e2e_s(self) -> float:
        """From the request to the last text."""
        return self.text_times_s[-1] - self.started_s

    @property
    def itl_s(self) -> tuple[float, ...]:
        """From each chunk to the next. A chunk is a token, except where text was held back."""
        times = self.text_times_s
        return tuple(after - before for before, after in pairwise(times))

    @property
    def tpot_s(self) -> float | None:
        """Mean time a token after the first; None where all was read at once."""
        return mean_tpot_s(self.text_times_s, self.num_tokens)


def mean_tpot_s(text_times_s: Sequence[float], num_tokens: int) -> float | None:
    """Return the mean time a token after those that were read with the first; None without one.

    A reader that is late finds several tokens at once, and when they were made it can't know.

    text_times_s  when each chunk was read, ascending; not empty
    """
    num_later = sum(read_s > text_times_s[0] for read_s in text_times_s)
    if num_tokens < 2 or not num_later:
        return None
    num_later_tokens = (num_tokens - 1) * num_later / (len(text_times_s) - 1)
    return (text_times_s[-1] - text_times_s[0]) / num_later_tokens


class _ReadClock:
    """Tells when what is at hand was read: it stands still until the event loop has waited."""

    def __init__(self) -> None:
        self._now_s: float | None = None

    def __call__(self) -> float:
        if self._now_s is None:
            self._now_s = time.perf_counter()
            asyncio.get_running_loop().call_soon(self._go_on)
        return self._now_s

    def _go_on(self) -> None:
        self._now_s = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What bounds decoding: the weights that a step reads, at the rate that memory gives them.

    unavailable  why neither is known; else None
    """

    step_bytes: float = 0.0
    read_bytes_per_s: float = 0.0
    unavailable: str | None = None

    def share(self, decode_tokens_per_s: float) -> float:
        """Return the part of it that a request decodes at, whose every token is a step's."""
        return decode_tokens_per_s * self.step_bytes / self.read_bytes_per_s


class Server:
    """One model of a server. Safe to call from many tasks of one event loop."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        asks_energy: bool = False,
    ) -> None:
        """Begin.

        asks_energy  whether a server is asked for each request's joules and dollars
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._http = http
        self._headers = {"X-Bitwatt-Shadow": "0"}  # mirrors would disturb what is measured
        if asks_energy:
            self._headers["X-Bitwatt-Energy"] = "1"
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def list_models(self) -> list[str]:
        """Return the names of the models that are served there."""
        return [card.name for card in await self.list_cards()]

    async def list_cards(self) -> list[ModelCard]:
        """Return the models that are served there."""
        response = await self._get("/v1/models")
        try:
            return [
                ModelCard(
                    name=str(card["id"]),
                    max_model_len=card.get("max_model_len"),
                    weights=card.get("weights"),
                )
                for card in response.json()["data"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StreamError(f"{self.url}/v1/models lists no models") from error

    async def choose_model(self, *, first: bool = True) -> None:
        """Check that the model is served there; without a name, take the first or the last one.

        Raises  ClientError, which names those that are
        """
        models = await self.list_models()
        if not models:
            raise ClientError(f"{self.url} serves no models")
        if not self.model:
            self.model = models[0] if first else models[-1]
        elif self.model not in models:
            raise ClientError(
                f"{self.url} serves no {self.model}; its models are {', '.join(models)}"
            )

    async def is_loading(self) -> bool:
        """Return whether the server says that the model loads; another kind of server says no."""
        response = await self._http.get(f"{self.url}/ready", headers=self._headers)
        try:
            state: object = response.json()["waiting_for"][self.model]
        except (ValueError, KeyError, TypeError):
            return False
        return state == "loading"

    async def usd_per_hour(self) -> float | None:
        """Return the rent that the server was told, an hour; None where it tells none."""
        try:
            prices = (await self._get("/bitwatt/v1/comparison")).json()["prices"]
            return float(prices["usd_per_hour"])
        except (ClientError, httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def fallback(self) -> str | None:
        """Return which slower backend runs there than could, and why; None if none is told."""
        try:
            state = (await self._get("/bitwatt/v1/comparison")).json()
            [engine] = [m["engine"] for m in state["models"] if m["name"] == self.model]
            told = engine["fallback"]
        except (ClientError, httpx.HTTPError, ValueError, KeyError, TypeError):
            return None  # another server, or a model that loads
        return told if isinstance(told, str) else None

    async def roofline(self) -> Roofline:
        """Return what bounds the model's decoding, as its server tells."""
        try:
            state = (await self._get("/bitwatt/v1/comparison")).json()
            [side] = [m for m in state["models"] if m["name"] == self.model]
            told, rate = side["engine"]["roofline"], side["read_bytes_per_s"]
            reason = told["unavailable"]
            step_bytes = float(told["step_bytes"])
            if reason is None and rate is None:
                reason = (
                    "its memory is timed in the first idle seconds, which there were none of yet"
                )
            if reason is not None:
                return Roofline(unavailable=f"{self.model}: {reason}")
            return Roofline(step_bytes=step_bytes, read_bytes_per_s=float(rate))
        except (ClientError, httpx.HTTPError, ValueError, KeyError, TypeError):
            return Roofline(unavailable=f"the server of {self.model} tells no roofline")

    async def scrape(self) -> Samples:
        """Return what the server's /metrics says now."""
        return parse_samples((await self._get("/metrics")).text)

    async def stream_chat(
        self, messages: Sequence[Message], **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it comes; options go into the request's body.

        Raises  ServerError, StreamError, httpx.HTTPError
        """
        async with aclosing(
            self._stream("/v1/chat/completions", {"messages": list(messages), **options})
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_completion(
        self, prompt: str | Sequence[int], **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the continuation as it comes, as `stream_chat` does."""
        async with aclosing(
            self._stream("/v1/completions", {"prompt": prompt, **options})
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _stream(self, path: str, given: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **given,
        }
        request = self._http.stream("POST", self.url + path, json=body, headers=self._headers)
        read_clock = _ReadClock()
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                raise _server_error(response)
            async with aclosing(_lines(response)) as lines:
                async for line in lines:
                    data = line.removeprefix("data:").strip()
                    if data == line or not data:  # a comment, or the space between events
                        if (told := read_comment(line, read_clock())) is not None:
                            yield told
                        continue
                    if data == "[DONE]":
                        return
                    yield read_event(data, read_clock())
        raise StreamError("the stream broke off before [DONE]")

    async def answer(self, messages: Sequence[Message], **options: Any) -> Answer:
        """Return the whole answer, timed as it streamed.

        Raises  ServerError, StreamError, httpx.HTTPError
        """
        return await whole_answer(self.stream_chat(messages, **options), time.perf_counter())

    async def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Return what /v1/completions answers; options go into the request's body.

        Raises  ServerError, StreamError, httpx.HTTPError
        """
        response = await self._http.post(
            f"{self.url}/v1/completions",
            json={"model": self.model, "prompt": prompt, **options},
            headers=self._headers,
        )
        if response.status_code != 200:
            raise _server_error(response)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise StreamError(f"{self.url}/v1/completions answers no JSON") from error
        return answer

    async def _get(self, path: str) -> httpx.Response:
        response = await self._http.get(self.url + path, headers=self._headers)
        if response.status_code != 200:
            raise _server_error(response, f" ({self.url}{path})")
        return response


async def whole_answer(chunks: AsyncGenerator[Chunk, None], started_s: float) -> Answer:
    """Return what the chunks of a stream make together.

    started_s  from which its times are counted, by time.perf_counter()

    Raises  ServerError, StreamError, httpx.HTTPError
    """
    texts: list[str] = []
    times_s: list[float] = []
    finish_reason: str | None = None
    num_prompt_tokens = num_tokens = None
    energy_joules = energy_reason = cost_usd = None
    async with aclosing(chunks) as events:
        async for chunk in events:
            if chunk.is_output:
                times_s.append(chunk.read_s)
                texts.append(chunk.text)
            finish_reason = chunk.finish_reason or finish_reason
            if chunk.num_tokens is not None:
                num_prompt_tokens, num_tokens = chunk.num_prompt_tokens, chunk.num_tokens
            energy_joules = energy_joules if chunk.energy_joules is None else chunk.energy_joules
            energy_reason = chunk.energy_reason or energy_reason
            cost_usd = cost_usd if chunk.cost_usd is None else chunk.cost_usd
    if not times_s or num_tokens is None:
        raise StreamError("the stream brought no answer with its usage")
    return Answer(
        text="".join(texts),
        num_prompt_tokens=num_prompt_tokens or 0,
        num_tokens=num_tokens,
        finish_reason=finish_reason,
        started_s=started_s,
        text_times_s=tuple(times_s),
        energy_joules=energy_joules,
        energy_reason=energy_reason,
        cost_usd=cost_usd,
    )


def new_http_client(
    *, max_connections: int | None = 1, timeout_s: float = 600.0
) -> httpx.AsyncClient:
    """Return a client with room for so many requests at once, or for any; to be closed."""
    most = None if max_connections is None else max_connections + 2
    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
        limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
    )


async def _lines(response: httpx.Response) -> AsyncGenerator[str, None]:
    async for line in response.aiter_lines():
        yield line


def _server_error(response: httpx.Response, where: str = "") -> ServerError:
    code = None
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message = response.text[:200] or response.reason_phrase
    return ServerError(response.status_code, message + where, code)
