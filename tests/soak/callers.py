"""Callers of many kinds. Each request has exactly one End for its caller, or that is a fault."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["CALLERS", "End", "Ledger", "call_for_ever"]

HANGS_AFTER_S = 90.0
_ERROR_FIELDS = {"message", "type", "param", "code"}


class End(StrEnum):
    """How a request ended for its caller."""

    ANSWERED = "answered"
    REFUSED = "refused"  # by a status and an error
    BROKEN = "broken"  # by an error in the middle of a stream
    DROPPED = "dropped"  # by the caller


class FaultError(Exception):
    """What no server may do."""


@dataclass
class Ledger:
    """What callers of one model counted.

    choices, tokens  of answers that came whole, as their usage says
    mid_choices      choices of requests that were dropped or broken: the server may have ended them
    longest_s        of a request that the server ended
    largest_gap_s    that the server let pass before it began to answer or sent the next piece
    faults           what no server may do, one line each
    """

    ends: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    choices: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    mid_choices: int = 0
    longest_s: float = 0.0
    largest_gap_s: float = 0.0
    num_open: int = 0
    is_stopping: bool = False  # the server: it takes no connection any more
    faults: list[str] = field(default_factory=list)

    @property
    def num_ended(self) -> int:
        return sum(self.ends.values())


@dataclass
class _Reply:
    status: int
    reader: asyncio.StreamReader
    headers: dict[str, str]


def _body(model: str, chance: random.Random) -> dict[str, Any]:
    """Return a request that is answered: of a shape drawn anew."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": [chance.randrange(5, 4000) for _ in range(chance.choice((1, 7, 40, 300)))],
        "max_tokens": chance.choice((1, 4, 16, 60, 200)),
        "temperature": chance.choice((0, 1)),
        "seed": chance.randrange(1000),
        "n": chance.choice((1, 1, 1, 2)),
    }
    match chance.randrange(6):
        case 0:
            body["stop"] = ["\n", "def "]
        case 1:
            body["logprobs"] = 2
        case 2:
            body["prompt"] = "import " * chance.randrange(1, 30)
        case 3:
            body["ignore_eos"] = True
    return body


async def _send(port: int, body: dict[str, Any]) -> tuple[_Reply, asyncio.StreamWriter]:
    """Send a request on a connection of its own; return the head of what comes back."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except ConnectionResetError as error:
        # A listener that closes resets what the kernel took and nobody accepted yet.
        raise ConnectionRefusedError("reset before an answer began") from error
    except BaseException:
        writer.transport.abort()
        raise
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return _Reply(int(head[0].split()[1]), reader, headers), writer


async def _lines(reply: _Reply, pause_s: float, gap: "_Gap") -> list[bytes]:
    """Return the body's lines, chunked or not; read slowly where asked to."""
    if reply.headers.get("transfer-encoding") != "chunked":
        return (await reply.reader.read()).split(b"\n")
    body = b""
    while size := int(await reply.reader.readline(), 16):
        body += await reply.reader.readexactly(size)
        await reply.reader.readexactly(2)
        gap.end()
        await asyncio.sleep(pause_s)
        gap.begin()
    return body.split(b"\n")


class _Gap:
    """The longest time that a caller has waited for the server, its own pauses left out."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.begin()

    def begin(self) -> None:
        self._since = time.monotonic()

    def end(self) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - self._since)


def _refused(reply: _Reply, lines: list[bytes]) -> End:
    error = json.loads(b"\n".join(lines))["error"]
    if error.keys() != _ERROR_FIELDS:
        raise FaultError(f"status {reply.status} has an error of {sorted(error)}")
    if reply.status not in (400, 500, 503) or (
        reply.status == 503 and "retry-after" not in reply.headers
    ):
        raise FaultError(f"status {reply.status}: {error}")
    return End.REFUSED


def _streamed(lines: list[bytes], num_choices: int, ledger: Ledger) -> End:
    finishes: Counter[int] = Counter()
    usage = None
    is_done = False
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        if is_done:
            raise FaultError("something came behind [DONE]")
        if line == b"data: [DONE]":
            is_done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return End.BROKEN
        for choice in event["choices"]:
            finishes[choice["index"]] += choice["finish_reason"] is not None
        usage = event.get("usage") or usage
    if not is_done:
        raise FaultError("a stream ended without [DONE] and without an error")
    if finishes != Counter(range(num_choices)):
        raise FaultError(f"of {num_choices} choices these finished: {dict(finishes)}")
    if usage is None:
        raise FaultError("a stream brought no usage")
    _count(usage, num_choices, ledger)
    return End.ANSWERED


def _whole(lines: list[bytes], num_choices: int, ledger: Ledger) -> End:
    answer = json.loads(b"\n".join(lines))
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    if len(reasons) != num_choices or None in reasons:
        raise FaultError(f"of {num_choices} choices these finished: {reasons}")
    _count(answer["usage"], num_choices, ledger)
    return End.ANSWERED


def _count(usage: dict[str, int], num_choices: int, ledger: Ledger) -> None:
    ledger.choices += num_choices
    ledger.tokens += usage["completion_tokens"]
    ledger.prompt_tokens += usage["prompt_tokens"]


async def _ask(
    port: int,
    ledger: Ledger,
    body: dict[str, Any],
    *,
    pause_s: float = 0.0,
    drop_after_s: float | None = None,
) -> End:
    """Return how a request ended; drop it after a while where asked to."""
    num_choices = body.get("n", 1)
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    writer = None
    started, gap = time.monotonic(), _Gap()
    try:
        async with asyncio.timeout(drop_after_s):
            reply, writer = await _send(port, body)
            lines = await _lines(reply, pause_s, gap)
            gap.end()
    except TimeoutError:
        ledger.mid_choices += num_choices
        return End.DROPPED
    finally:
        if writer is not None:
            writer.transport.abort()
    ledger.statuses[reply.status] += 1
    ledger.longest_s = max(ledger.longest_s, time.monotonic() - started)
    ledger.largest_gap_s = max(ledger.largest_gap_s, gap.longest_s)
    if reply.status != 200:
        if reply.status != 400:
            ledger.mid_choices += num_choices
        return _refused(reply, lines)
    if not body.get("stream"):
        return _whole(lines, num_choices, ledger)
    end = _streamed(lines, num_choices, ledger)
    if end is End.BROKEN:
        ledger.mid_choices += num_choices
    return end


async def whole(port: int, model: str, ledger: Ledger, chance: random.Random) -> End:
    return await _ask(port, ledger, _body(model, chance))


async def streaming(port: int, model: str, ledger: Ledger, chance: random.Random) -> End:
    return await _ask(port, ledger, _body(model, chance) | {"stream": True})


async def slow(port: int, model: str, ledger: Ledger, chance: random.Random) -> End:
    body = _body(model, chance) | {"stream": True}
    return await _ask(port, ledger, body, pause_s=0.02)


async def dropping(port: int, model: str, ledger: Ledger, chance: random.Random) -> End:
    body = _body(model, chance) | {"stream": chance.random() < 0.7, "max_tokens": 400}
    return await _ask(port, ledger, body, drop_after_s=chance.uniform(0, 0.5))


async def wrong(port: int, model: str, ledger: Ledger, chance: random.Random) -> End:
    body = _body(model, chance) | chance.choice(
        ({"max_tokens": -1}, {"prompt": [5] * 5000}, {"temperature": "hot"}, {"stop": [""]})
    )
    end = await _ask(port, ledger, body)
    if end is not End.REFUSED:
        raise FaultError(f"a wrong request was {end}")
    return end


CALLERS = {"calm": (whole, streaming, slow, wrong), "wild": (whole, streaming, slow, dropping)}
"""Of a model that nothing happens to, and of one whose engine is killed and whose callers leave."""


async def call_for_ever(
    port: int, model: str, kind: str, ledger: Ledger, chance: random.Random, think_s: float
) -> None:
    """Ask one request after the other until cancelled, between two; write all into the ledger."""
    while True:
        await asyncio.sleep(chance.uniform(0, 2 * think_s))
        caller = chance.choice(CALLERS[kind])
        ledger.num_open += 1
        request = asyncio.ensure_future(
            asyncio.wait_for(caller(port, model, ledger, chance), HANGS_AFTER_S)
        )
        try:
            ledger.ends[await asyncio.shield(request)] += 1
        except asyncio.CancelledError:
            await _end(request, ledger, caller.__name__)
            raise
        except Exception as error:
            _write_down(error, ledger, caller.__name__)
        finally:
            ledger.num_open -= 1


async def _end(request: "asyncio.Future[End]", ledger: Ledger, name: str) -> None:
    """Let a request end that runs when the traffic stops."""
    try:
        ledger.ends[await request] += 1
    except Exception as error:
        _write_down(error, ledger, name)


def _write_down(error: Exception, ledger: Ledger, name: str) -> None:
    if isinstance(error, ConnectionRefusedError) and ledger.is_stopping:
        ledger.ends[End.REFUSED] += 1
    else:
        ledger.faults.append(f"{name}: {type(error).__name__}: {error}")
