"""Shadow traffic: a request that one model answers is asked of its twin too, and they are compared.

The caller gets the first model's answer, as if there were no twin. The mirror starts once that
answer is complete, in the least priority, where the twin has nothing waiting; a few mirrors wait
and the rest, and those of many choices, are dropped. What the pair took and how far the texts agree
goes into metrics.
"""

import asyncio
import logging
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from bitwatt.errors import BitwattError, InvalidRequestError
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Deltas, Generation
from bitwatt.serving.models import Catalog, ServedModel
from bitwatt.serving.request import GenerationRequest
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.metrics import Metrics, ModelMetrics

__all__ = ["FIELD", "Shadow", "agreement"]

FIELD = "X-Bitwatt-Shadow"
"""The field in which a caller asks for a mirror, for errors to name."""

_LEAST_PRIORITY = 2**31 - 1
_NUM_WORKERS = 2
_MAX_WAITING = 16
_MAX_CHOICES = 8  # each takes a place in the twin's queue
_PARTS_OF_A_PERCENT = 10_000

Outcome = Literal["compared", "dropped", "busy", "failed", "abandoned"]

logger = logging.getLogger(__name__)


def agreement(one: str, other: str) -> float:
    """Return the share of the longer text before the two part; 1 where they are equal."""
    if one == other:
        return 1.0
    differ = (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
    return next(differ, min(len(one), len(other))) / max(len(one), len(other))


@dataclass(slots=True)
class _Answer:
    """What one side said and when, in seconds of a monotonic clock."""

    generation: Generation
    started_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    ended_s: float | None = None
    texts: dict[int, str] = field(default_factory=dict)

    def take(self, delta: Delta) -> None:
        now_s = time.perf_counter()
        if delta.text and self.first_s is None:
            self.first_s = now_s
        self.ended_s = now_s
        self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text


@dataclass(frozen=True, slots=True)
class _Mirror:
    """A mirror that waits for its turn."""

    original: _Answer
    twin: ServedModel
    request: GenerationRequest


class Shadow:
    """Mirrors requests between the two models of a server. Used from one event loop."""

    def __init__(
        self, catalog: Catalog, metrics: Metrics, *, percent: float, timeout_s: float
    ) -> None:
        """Prepare; mirrors run between start() and stop().

        percent  of requests that don't say, which are mirrored
        """
        self._catalog = catalog
        self._metrics = metrics
        self._parts = round(percent * _PARTS_OF_A_PERCENT)
        self._timeout_s = timeout_s
        # Never exposed: what mirrors do stays out of the series of callers' requests.
        self._aside: ModelMetrics = Metrics().model("mirror")
        self._waiting: asyncio.Queue[_Mirror] = asyncio.Queue(_MAX_WAITING)
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to run mirrors."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(_NUM_WORKERS)]

    async def stop(self) -> None:
        """Give up the mirrors that run and those that wait."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def offer(self, wish: bool | None, request: GenerationRequest, generation: Generation) -> None:
        """Mirror the request, if it is to be, once its generation is complete.

        wish        whether the caller wants a mirror; None leaves it to the percentage
        generation  the request's, by the model that the caller named

        Raises  InvalidRequestError where a mirror is wanted and there is no twin
        """
        if wish is None:
            wish = secrets.randbelow(100 * _PARTS_OF_A_PERCENT) < self._parts
        if not wish:
            return
        twins = [m for m in self._catalog.by_name.values() if m is not generation.model]
        if len(twins) != 1:
            raise InvalidRequestError(
                f"{FIELD} needs two models, {len(twins) + 1} served here (--compare)",
                param=FIELD,
            )
        generation.tap = lambda deltas: self._tap(deltas, generation, twins[0], request)

    async def _tap(
        self,
        deltas: Deltas,
        generation: Generation,
        twin: ServedModel,
        request: GenerationRequest,
    ) -> Deltas:
        """Yield the deltas as they come; when they have come to their end, queue the mirror."""
        original = _Answer(generation)
        is_complete = False
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    original.take(delta)
                    yield delta
            is_complete = True
        finally:
            if is_complete:
                self._queue(_Mirror(original, twin, request))
            else:
                self._count(original, twin, "abandoned")

    def _queue(self, mirror: _Mirror) -> None:
        is_small = len(mirror.original.generation.submits) <= _MAX_CHOICES
        if is_small and not self._waiting.full():
            self._waiting.put_nowait(mirror)
        else:
            self._count(mirror.original, mirror.twin, "dropped")

    def _count(self, original: _Answer, twin: ServedModel, outcome: Outcome) -> None:
        pair = original.generation.model.name, twin.name
        self._metrics[declared.SHADOW_REQUESTS].labels(*pair, outcome).inc()

    async def _work(self) -> None:
        while True:
            mirror = await self._waiting.get()
            outcome: Outcome = "failed"
            try:
                outcome = await self._run(mirror)
            except asyncio.CancelledError:
                outcome = "abandoned"
                raise
            except (BitwattError, TimeoutError) as error:
                logger.info("a mirror to %s failed: %s", mirror.twin.name, error)
            except Exception:
                logger.exception("a mirror to %s failed", mirror.twin.name)
            finally:
                self._count(mirror.original, mirror.twin, outcome)

    async def _run(self, mirror: _Mirror) -> Outcome:
        if mirror.twin.metrics.stats.num_waiting:
            return "busy"
        request = replace(
            mirror.request,
            request_id=f"shadow-{secrets.token_hex(8)}",
            params=replace(mirror.request.params, priority=_LEAST_PRIORITY),
        )
        async with asyncio.timeout(self._timeout_s):
            generation = await request.for_model(replace(mirror.twin, metrics=self._aside))
            answer = _Answer(generation)
            async with aclosing(generation.stream()) as deltas:
                async for delta in deltas:
                    answer.take(delta)
        self._observe(mirror.original, answer)
        return "compared"

    def _observe(self, original: _Answer, mirror: _Answer) -> None:
        metrics = self._metrics
        pair = original.generation.model.name, mirror.generation.model.name
        for side, answer in (("original", original), ("mirror", mirror)):
            labels = (*pair, side)
            if answer.ended_s is not None:
                latency = metrics[declared.SHADOW_LATENCY].labels(*labels)
                latency.observe(answer.ended_s - answer.started_s)
            if answer.first_s is not None:
                first = metrics[declared.SHADOW_TIME_TO_FIRST_TOKEN].labels(*labels)
                first.observe(answer.first_s - answer.started_s)
            usage, tokens = answer.generation.usage, metrics[declared.SHADOW_TOKENS]
            tokens.labels(*labels, "prompt").inc(usage.prompt_tokens)
            tokens.labels(*labels, "generation").inc(usage.completion_tokens)
            if usage.bitwatt.energy_joules is not None:
                metrics[declared.SHADOW_ENERGY].labels(*labels).inc(usage.bitwatt.energy_joules)
        for index, submit in enumerate(original.generation.submits):
            if submit.sampling.temperature == 0:
                texts = original.texts.get(index, ""), mirror.texts.get(index, "")
                metrics[declared.SHADOW_AGREEMENT].labels(*pair).observe(agreement(*texts))
