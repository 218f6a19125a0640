"""Requests to a real server, timed as their callers see them."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
from bitwatt_client.errors import ClientError, StreamError
from bitwatt_client.server import Server

__all__ = ["Callers", "Stream", "engine_state", "prompt_of"]

_FIRST_TOKEN_ID = 5  # behind the special ones
_LONGEST_S = 600.0  # that an answer may take
_TOLD_BYTES = 300  # of an error


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed answer; times of time.perf_counter.

    times_s  when each chunk was read
    """

    started_s: float
    times_s: tuple[float, ...]
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """From the request to the first token."""
        return self.times_s[0] - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None of one token."""
        if self.num_tokens < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.num_tokens - 1)


def prompt_of(num_tokens: int, number: int) -> list[int]:
    """Return so many token ids, that no other number's prompt begins with."""
    ids, rest = [], number
    for _ in range(min(num_tokens, 8)):
        ids.append(_FIRST_TOKEN_ID + rest % 64)
        rest //= 64
    return ids + [_FIRST_TOKEN_ID + (31 * number + j) % 200 for j in range(num_tokens - len(ids))]


class Callers:
    """Callers of one model, who keep their connections; a context.

    They share a machine with the server that they measure. So they speak HTTP/1.1 themselves, and
    read of each event what they need: a tenth of what a client library takes for a token.
    """

    def __init__(self, server: Server, *, authorization: str | None = None) -> None:
        """Begin; authorization is the header's value.

        Raises  ClientError for an address that has no host
        """
        url = httpx.URL(server.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ClientError(f"{server.url} is no address of a server")
        self._model = server.model
        self._url = server.url
        self._address = (url.host, url.port or {"http": 80, "https": 443}[url.scheme])
        self._is_tls = url.scheme == "https"
        self._head = (
            f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\n"
            f"Host: {url.netloc.decode()}\r\nContent-Type: application/json\r\n"
            "X-Bitwatt-Shadow: 0\r\n"  # mirrors would disturb what is measured
            + (f"Authorization: {authorization}\r\n" if authorization else "")
        )
        self._idle: list[_Connection] = []

    async def stream(self, prompt: Sequence[int], max_tokens: int, salt: str) -> Stream:
        """Return the answer of exactly max_tokens to a prompt of token ids.

        salt    keeps prompts out of each other's prefix cache
        Raises  StreamError, OSError
        """
        started_s = time.perf_counter()
        body = json.dumps(
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "cache_salt": salt,
                # As text alone, what can't be shown yet would be held back, and its time be lost.
                "logprobs": 0,
            }
        )
        request = f"{self._head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        try:
            async with asyncio.timeout(_LONGEST_S):
                connection, head = await self._ask(request)
                times_s, num_tokens = await self._read(connection, head)
        except TimeoutError as error:
            raise StreamError(f"{self._url} took more than {_LONGEST_S:.0f} s") from error
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise StreamError(f"{self._url} broke off, or answers no HTTP/1.1") from error
        self._idle.append(connection)
        if not times_s or not num_tokens:
            raise StreamError("the stream brought no answer with its usage")
        return Stream(started_s, tuple(times_s), num_tokens)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _reader, writer in self._idle:
            writer.close()

    async def _ask(self, request: bytes) -> tuple["_Connection", bytes]:
        """Return a connection and the head of the answer on it."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return connection, await _head_of(connection, request)
            except (OSError, asyncio.IncompleteReadError):
                connection[1].close()  # the server has closed it since
        connection = await asyncio.open_connection(*self._address, ssl=self._is_tls or None)
        return connection, await _head_of(connection, request)

    async def _read(self, connection: "_Connection", head: bytes) -> tuple[list[float], int]:
        """Return when each token's event was read, and how many tokens the usage tells."""
        reader, writer = connection
        status = int(head.split(None, 2)[1])
        if status != 200:
            told = (await reader.read(_TOLD_BYTES)).decode(errors="replace")
            writer.close()
            raise StreamError(f"{self._url} answered {status}: {told}")
        times_s: list[float] = []
        num_tokens = 0
        rest = b""
        while size := int(await reader.readline(), 16):
            data = await reader.readexactly(size + 2)
            now_s = time.perf_counter()
            *lines, rest = (rest + data[:-2]).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                if b'"choices":[{' in line and b'"error"' not in line:
                    times_s.append(now_s)
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise StreamError(str(event["error"]["message"]))
                if event.get("choices"):
                    times_s.append(now_s)
                usage = event.get("usage")
                num_tokens = usage["completion_tokens"] if usage else num_tokens
        await reader.readline()
        return times_s, num_tokens


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _head_of(connection: _Connection, request: bytes) -> bytes:
    connection[1].write(request)
    return await connection[0].readuntil(b"\r\n\r\n")


async def engine_state(http: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    """Return what /bitwatt/v1/comparison says of the model.

    Raises  StreamError where it says nothing
    """
    response = await http.get(f"{server.url}/bitwatt/v1/comparison")
    try:
        [state] = [m for m in response.json()["models"] if m["name"] == server.model]
    except (ValueError, KeyError, TypeError) as error:
        raise StreamError(f"{server.url} is no bitwatt server that has {server.model}") from error
    if not isinstance(state, dict) or not state.get("engine"):
        raise StreamError(f"{server.model} is still loading at {server.url}")
    return state
