"""What one key may have: so many requests at once, so many tokens a minute."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from bitwatt.api.errors import RETRY_AFTER_S, error_response
from bitwatt.api.middleware import KEY_DIGEST
from bitwatt.errors import EngineUnavailableError, QueueFullError
from bitwatt.serving.generation import Generation

__all__ = ["KeyLimits", "LimitKeys"]

_MINUTE_S = 60.0
_MAX_RETRY_AFTER_S = 3600


class KeyLimits:
    """Counts each key's open requests and its tokens; used from one event loop.

    Tokens are a bucket that fills evenly. An answer's are known when it ends, so they are taken
    then, below nothing if need be, and the key waits until the bucket has some again: over any
    time a key has its rate, a minute's worth saved up, and what it had open when that ran out.

    max_requests       a key's, open at once; None for no limit
    tokens_per_minute  of prompts and answers; None for no limit
    clock              seconds, never going back
    """

    def __init__(
        self,
        *,
        max_requests: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_requests = max_requests
        self.tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._num_open: dict[bytes, int] = defaultdict(int)
        self._buckets: dict[bytes, tuple[float, float]] = {}  # tokens, and when there were so many

    @contextmanager
    def place(self, digest: bytes) -> Iterator[bool]:
        """Hold a place among the key's open requests; gives whether there was one."""
        if self.max_requests is not None and self._num_open[digest] >= self.max_requests:
            yield False
            return
        self._num_open[digest] += 1
        try:
            yield True
        finally:
            self._num_open[digest] -= 1

    def wait_s(self, digest: bytes) -> float:
        """Return seconds until the key has a token to spend; 0 where it has."""
        if self.tokens_per_minute is None:
            return 0.0
        return max(0.0, (1 - self._balance(digest)) * _MINUTE_S / self.tokens_per_minute)

    @contextmanager
    def charging(self, digest: bytes | None, generation: Generation) -> Iterator[None]:
        """Take what the generation used from the key's tokens, however it ends.

        One that no engine took costs nothing.
        """
        is_taken = True
        try:
            yield
        except (QueueFullError, EngineUnavailableError):
            is_taken = False
            raise
        finally:
            if is_taken and digest is not None:
                self.charge(digest, generation.usage.total_tokens)

    def charge(self, digest: bytes, num_tokens: int) -> None:
        """Take the tokens from the key's."""
        if self.tokens_per_minute is not None:
            self._buckets[digest] = self._balance(digest) - num_tokens, self._clock()

    def _balance(self, digest: bytes) -> float:
        rate = self.tokens_per_minute
        assert rate is not None
        now_s = self._clock()
        tokens, then_s = self._buckets.get(digest, (float(rate), now_s))
        return min(float(rate), tokens + (now_s - then_s) * rate / _MINUTE_S)


class LimitKeys:
    """Turns a key's requests with a body away with 429 while it has what it may.

    It lies behind RequireKey, which says whose a request is, and behind LimitBody, so that a body
    that is slow to come takes no place.
    """

    def __init__(self, app: ASGIApp, *, limits: KeyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        digest: bytes | None = scope.get(KEY_DIGEST)
        if digest is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limits = self._limits
        wait_s = limits.wait_s(digest)
        if wait_s > 0:
            message = (
                f"the key has used its {limits.tokens_per_minute} tokens a minute "
                "(--tokens-per-minute-per-key)"
            )
            await self._refuse(message, wait_s, scope, receive, send)
            return
        with limits.place(digest) as is_placed:
            if is_placed:
                await self._app(scope, receive, send)
                return
        message = f"the key has {limits.max_requests} requests open (--max-open-requests-per-key)"
        await self._refuse(message, RETRY_AFTER_S, scope, receive, send)

    async def _refuse(
        self, message: str, wait_s: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        seconds = min(math.ceil(wait_s), _MAX_RETRY_AFTER_S)
        response = error_response(
            429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)}
        )
        await response(scope, receive, send)
