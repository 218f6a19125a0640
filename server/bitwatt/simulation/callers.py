"""Requests to a real server, timed as their callers see them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from bitwatt_client.errors import StreamError
from bitwatt_client.server import Server

__all__ = ["Stream", "engine_state", "prompt_of", "stream"]

_FIRST_TOKEN_ID = 5  # behind the special ones


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


async def stream(
    http: httpx.AsyncClient, server: Server, prompt: Sequence[int], max_tokens: int, salt: str
) -> Stream:
    """Return the answer of exactly max_tokens to a prompt of token ids.

    salt    keeps prompts out of each other's prefix cache
    Raises  StreamError, httpx.HTTPError
    """
    body = {
        "model": server.model,
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
    started_s = time.perf_counter()
    times_s: list[float] = []
    num_tokens = 0
    async with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            told = (await response.aread()).decode(errors="replace")
            raise StreamError(f"{server.url} answered {response.status_code}: {told[:300]}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise StreamError(str(event["error"]["message"]))
            if event["choices"]:
                times_s.append(time.perf_counter())
            usage = event.get("usage")
            num_tokens = usage["completion_tokens"] if usage else num_tokens
    if not times_s or not num_tokens:
        raise StreamError("the stream brought no answer with its usage")
    return Stream(started_s, tuple(times_s), num_tokens)


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
