"""One model of an OpenAI-compatible server, called and timed."""

import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from bitwatt_client.errors import ServerError, StreamError
from bitwatt_client.exposition import Samples, parse_samples

__all__ = ["Answer", "Chunk", "Message", "Server", "new_http_client"]

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream.

    num_prompt_tokens, num_tokens  with the last chunk, as the server counted them
    """

    text: str
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A streamed answer and its times, in seconds of one monotonic clock.

    num_tokens     generated, as the server counted them
    text_times_s   when each chunk that has text or the end came
    """

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: str | None
    started_s: float
    text_times_s: tuple[float, ...]

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
        """Mean time a token after the first; None for an answer of one token."""
        if self.num_tokens < 2 or len(self.text_times_s) < 2:
            return None
        return (self.text_times_s[-1] - self.text_times_s[0]) / (self.num_tokens - 1)


class Server:
    """One model of a server. Safe to call from many tasks of one event loop."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, model: str, *, api_key: str | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._http = http
        self._headers = {"X-Bitwatt-Shadow": "0"}  # mirrors would disturb what is measured
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def list_models(self) -> list[str]:
        """Return the names of the models that are served there."""
        response = await self._get("/v1/models")
        try:
            return [str(card["id"]) for card in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError(f"{self.url}/v1/models lists no models") from error

    async def scrape(self) -> Samples:
        """Return what the server's /metrics says now."""
        return parse_samples((await self._get("/metrics")).text)

    async def stream_chat(
        self, messages: Sequence[Message], **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it comes; options go into the request's body.

        Raises  ServerError, StreamError, httpx.HTTPError
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        request = self._http.stream(
            "POST", f"{self.url}/v1/chat/completions", json=body, headers=self._headers
        )
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                raise _server_error(response)
            async with aclosing(_lines(response)) as lines:
                async for line in lines:
                    data = line.removeprefix("data:").strip()
                    if data == line or not data:
                        continue  # a comment, or the space between events
                    if data == "[DONE]":
                        return
                    yield _chunk(data)
        raise StreamError("the stream broke off before [DONE]")

    async def answer(self, messages: Sequence[Message], **options: Any) -> Answer:
        """Return the whole answer, timed as it streamed.

        Raises  ServerError, StreamError, httpx.HTTPError
        """
        clock = time.perf_counter
        started_s = clock()
        texts: list[str] = []
        times_s: list[float] = []
        finish_reason: str | None = None
        num_prompt_tokens = num_tokens = None
        async with aclosing(self.stream_chat(messages, **options)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.finish_reason is not None:
                    times_s.append(clock())
                    texts.append(chunk.text)
                finish_reason = chunk.finish_reason or finish_reason
                if chunk.num_tokens is not None:
                    num_prompt_tokens, num_tokens = chunk.num_prompt_tokens, chunk.num_tokens
        if not times_s or num_tokens is None:
            raise StreamError("the stream brought no answer with its usage")
        return Answer(
            text="".join(texts),
            num_prompt_tokens=num_prompt_tokens or 0,
            num_tokens=num_tokens,
            finish_reason=finish_reason,
            started_s=started_s,
            text_times_s=tuple(times_s),
        )

    async def _get(self, path: str) -> httpx.Response:
        response = await self._http.get(self.url + path, headers=self._headers)
        if response.status_code != 200:
            raise _server_error(response)
        return response


def new_http_client(*, max_connections: int = 1, timeout_s: float = 600.0) -> httpx.AsyncClient:
    """Return a client with room for so many requests at once; to be closed."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout_s, connect=10.0),
        limits=httpx.Limits(max_connections=max_connections + 2),
    )


async def _lines(response: httpx.Response) -> AsyncGenerator[str, None]:
    async for line in response.aiter_lines():
        yield line


def _chunk(data: str) -> Chunk:
    try:
        event = json.loads(data)
        if "error" in event:
            raise StreamError(str(event["error"]["message"]))
        usage = event.get("usage") or {}
        choices = event["choices"]
        choice = choices[0] if choices else {}
        return Chunk(
            text=choice.get("delta", {}).get("content") or "",
            finish_reason=choice.get("finish_reason"),
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_tokens=usage.get("completion_tokens"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StreamError(f"an event makes no sense: {data[:200]}") from error


def _server_error(response: httpx.Response) -> ServerError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    return ServerError(response.status_code, message)
