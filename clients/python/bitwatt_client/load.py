"""A closed loop of requests: so many at once, a new one when one ends."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from bitwatt_client.errors import ClientError, told
from bitwatt_client.server import Answer, Server

__all__ = ["Window", "Work", "run_window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a window asks of a server: the same of each, so that equal work is compared.

    max_tokens     of every answer; the end-of-text token is ignored, so each has exactly as many
    max_s          after which nothing new is sent and what runs is dropped
    """

    prompts: Sequence[str]
    num_requests: int
    concurrency: int
    max_tokens: int
    max_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a window brought.

    failures   why requests failed, one entry each
    num_cut    requests that max_s left unsent or unfinished
    wall_s     from the first request to the last end
    """

    answers: tuple[Answer, ...]
    failures: tuple[str, ...]
    num_cut: int
    wall_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second, over all requests together."""
        return self.num_tokens / self.wall_s


async def run_window(
    server: Server, work: Work, *, salt: str = "", on_end: Callable[[], None] | None = None
) -> Window:
    """Return what the server did with the work. Requests that fail are counted, not raised.

    salt    sets the server's prefix cache apart from other windows', which ran the same prompts
    on_end  called when a request has ended
    """
    answers: list[Answer] = []
    failures: list[str] = []
    numbers = iter(range(work.num_requests))
    started_s = time.perf_counter()
    try:
        async with asyncio.timeout(work.max_s), asyncio.TaskGroup() as group:
            for _ in range(min(work.concurrency, work.num_requests)):
                group.create_task(_caller(server, work, numbers, salt, answers, failures, on_end))
    except TimeoutError:
        pass
    return Window(
        answers=tuple(answers),
        failures=tuple(failures),
        num_cut=work.num_requests - len(answers) - len(failures),
        wall_s=time.perf_counter() - started_s,
    )


async def _caller(
    server: Server,
    work: Work,
    numbers: Iterator[int],
    salt: str,
    answers: list[Answer],
    failures: list[str],
    on_end: Callable[[], None] | None,
) -> None:
    for number in numbers:
        prompt = work.prompts[number % len(work.prompts)]
        try:
            answer = await server.answer(
                [{"role": "user", "content": prompt}],
                max_tokens=work.max_tokens,
                temperature=0,
                seed=work.seed + number,
                ignore_eos=True,
                **({"cache_salt": salt} if salt else {}),
            )
        except (ClientError, httpx.HTTPError) as error:
            failures.append(told(error))
        else:
            answers.append(answer)
        if on_end is not None:
            on_end()
