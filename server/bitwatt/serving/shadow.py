"""Shadow traffic: a request that one model answers is asked of its twin too, and they are compared.

The caller gets the first model's answer, as if there were no twin. The mirror waits until that
answer is complete and nobody calls a model on the twin's device; then it runs alone, and is given
up when a caller comes. So models that share a machine's cores or a GPU wait for each other's
callers, and a twin with a GPU of its own for its own alone. All callers come by here, before the
engine that is to answer them hears of it, and long before another engine could. Those of a twin
that another server has (--twin-url) come by there: it is asked of them ten times a second.

A mirror has one try: in a second it would find its prompt in the prefix cache. A few wait; then the
oldest is dropped, as are those of many choices. What the pair took and how far the texts agree goes
into metrics.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bitwatt.errors import BitwattError, InvalidRequestError
from bitwatt.serving.generation import Deltas, Generation
from bitwatt.serving.models import Callers, Catalog
from bitwatt.serving.remote_twin import RemoteTwin
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.twins import Answer, Asked, LocalTwin, Posted, Twin, callers_of
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.metrics import Metrics, ModelMetrics

__all__ = ["FIELD", "Shadow", "agreement"]

FIELD = "X-Bitwatt-Shadow"
"""The field in which a caller asks for a mirror, for errors to name."""

_MAX_WAITING = 16
_MAX_CHOICES = 8  # each takes a place in the twin's queue
_PARTS_OF_A_PERCENT = 10_000

_LOOK_AGAIN_S = 0.05
_QUIET_S = 0.2  # a client that asks again at once leaves no such gap, and meets no mirror
_MAX_COST = 0.05  # of callers' time, where their requests meet the last step of a mirror

Outcome = Literal["compared", "preempted", "dropped", "failed", "abandoned"]

logger = logging.getLogger(__name__)


def agreement(one: str, other: str) -> float:
    """Return the share of the longer text before the two part; 1 where they are equal."""
    if one == other:
        return 1.0
    differ = (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
    return next(differ, min(len(one), len(other))) / max(len(one), len(other))


@dataclass(frozen=True, slots=True, eq=False)
class _Mirror:
    """A mirror that waits for its turn.

    pair      names of the model that was called, and of its twin
    original  the answer of the former to that generation
    """

    pair: tuple[str, str]
    original: Answer
    generation: Generation
    twin: Twin
    asked: Asked


class Shadow:
    """Mirrors requests between two models. Used from one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        metrics: Metrics,
        *,
        percent: float,
        timeout_s: float,
        twin: RemoteTwin | None = None,
    ) -> None:
        """Prepare; mirrors run between start() and stop().

        percent  of requests that don't say, which are mirrored
        twin     that another server has
        """
        self._remote = twin
        self._catalog = catalog
        self._metrics = metrics
        self._parts = round(percent * _PARTS_OF_A_PERCENT)
        self._timeout_s = timeout_s
        self._waiting: deque[_Mirror] = deque()
        self._some_wait = asyncio.Event()
        self._not_before_s = 0.0
        self._worker: asyncio.Task[None] | None = None

    @cached_property
    def _aside(self) -> ModelMetrics:
        """Never exposed: what mirrors do stays out of the series of callers' requests."""
        return Metrics().model("mirror")

    def start(self) -> None:
        """Begin to run mirrors."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Give up the mirror that runs and those that wait."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        while self._waiting:
            self._count(self._take(self._waiting[0]), "abandoned")

    def offer(
        self,
        wish: bool | None,
        request: GenerationRequest,
        generation: Generation,
        posted: Posted,
    ) -> None:
        """Mirror the request, if it is to be, once its generation is complete.

        wish        whether the caller wants a mirror; None leaves it to the percentage
        generation  the request's, by the model that the caller named
        posted      the same request as it came

        Token ids are no request to a twin of another vocabulary: such are dropped.

        Raises  InvalidRequestError where a mirror is wanted and there is no twin, or that can't
                be asked
        """
        is_wanted = wish is True
        if wish is None:
            wish = secrets.randbelow(100 * _PARTS_OF_A_PERCENT) < self._parts
        if not wish:
            return
        twins: list[Twin] = [] if self._remote is None else [self._remote]
        models = self._catalog.by_name.values()
        twins += [LocalTwin(m, self._aside) for m in models if m is not generation.model]
        if len(twins) != 1:
            raise InvalidRequestError(
                f"{FIELD} needs two models, {len(twins) + 1} served here (--compare, --twin, "
                "--twin-url)",
                param=FIELD,
            )
        if request.has_token_ids and not twins[0].has_vocabulary_of(generation.model):
            if is_wanted:
                raise InvalidRequestError(
                    f"{FIELD} can't ask {twins[0].name} by token ids: its vocabulary is another",
                    param=FIELD,
                )
            pair = (generation.model.name, twins[0].name)
            self._metrics[declared.SHADOW_REQUESTS].labels(*pair, "dropped").inc()
            return
        same = request.settled_for(generation.model)  # by the twin's defaults it were another
        asked = Asked(same, posted, len(generation.submits))
        generation.tap = lambda deltas: self._tap(deltas, generation, twins[0], asked)

    async def _tap(
        self,
        deltas: Deltas,
        generation: Generation,
        twin: Twin,
        asked: Asked,
    ) -> Deltas:
        """Yield the deltas as they come; when they have come to their end, queue the mirror."""
        pair = (generation.model.name, twin.name)
        mirror = _Mirror(pair, Answer(), generation, twin, asked)
        is_complete = False
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    mirror.original.take(delta.index, delta.text)
                    yield delta
            is_complete = True
        finally:
            if is_complete:
                self._queue(mirror)
            else:
                self._count(mirror, "abandoned")

    def _queue(self, mirror: _Mirror) -> None:
        if mirror.asked.num_choices > _MAX_CHOICES:
            self._count(mirror, "dropped")
            return
        if len(self._waiting) == _MAX_WAITING:
            self._count(self._take(self._waiting[0]), "dropped")
        self._waiting.append(mirror)
        self._some_wait.set()
        self._metrics[declared.SHADOW_WAITING].labels(*mirror.pair).inc()

    def _take(self, mirror: _Mirror) -> _Mirror:
        """Return the mirror, which waits no more."""
        self._waiting.remove(mirror)
        if not self._waiting:
            self._some_wait.clear()
        self._metrics[declared.SHADOW_WAITING].labels(*mirror.pair).dec()
        return mirror

    def _count(self, mirror: _Mirror, outcome: Outcome) -> None:
        self._metrics[declared.SHADOW_REQUESTS].labels(*mirror.pair, outcome).inc()

    async def _work(self) -> None:
        if self._remote is not None:
            await self._remote.look()  # mirrors are counted by its name
        while True:
            await self._some_wait.wait()
            for waiting in list(self._waiting):
                await waiting.twin.look()
            mirror = next((m for m in self._waiting if self._may_run(m.twin)), None)
            if mirror is not None:
                await mirror.twin.look(at_once=True)
            if mirror is None or not self._may_run(mirror.twin):
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            outcome: Outcome = "failed"
            try:
                outcome = await self._run_until_a_caller_comes(self._take(mirror))
            except asyncio.CancelledError:
                outcome = "abandoned"
                raise
            except (BitwattError, TimeoutError) as error:
                logger.info("a mirror to %s failed: %s", mirror.pair[1], error)
            except Exception:
                logger.exception("a mirror to %s failed", mirror.pair[1])
            finally:
                self._count(mirror, outcome)
            if outcome == "preempted":
                await self._make_up_for(mirror.twin)

    def _may_run(self, twin: Twin) -> bool:
        now_s = time.monotonic()
        return now_s >= self._not_before_s and all(
            callers.num_open == 0 and now_s - callers.left_s >= _QUIET_S
            for callers in self._callers_beside(twin)
        )

    def _callers_beside(self, twin: Twin) -> list[Callers]:
        """Return the callers of each model on the twin's device, the twin's own among them."""
        beside = callers_of(self._catalog.by_name.values(), twin.device)
        return beside if twin.callers in beside else [*beside, twin.callers]

    async def _run_until_a_caller_comes(self, mirror: _Mirror) -> Outcome:
        run = asyncio.create_task(self._run(mirror))
        beside = self._callers_beside(mirror.twin)
        for callers in beside:
            callers.on_arrival.add(run.cancel)
        try:
            await asyncio.wait([run])
        finally:
            for callers in beside:
                callers.on_arrival.discard(run.cancel)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        return "preempted" if run.cancelled() else run.result()

    async def _make_up_for(self, twin: Twin) -> None:
        """Let no mirror run before what this one's last step cost is too little to be felt.

        The engine ends its step before it gives the mirror up: seconds, of a long prompt on a CPU.
        """
        since_s = time.monotonic()
        await twin.settle()
        now_s = time.monotonic()
        self._not_before_s = now_s + (now_s - since_s) / _MAX_COST

    async def _run(self, mirror: _Mirror) -> Outcome:
        async with asyncio.timeout(self._timeout_s):
            answer = await mirror.twin.answer(mirror.asked)
        mirror.original.usage = mirror.generation.usage
        self._observe(mirror, answer)
        return "compared"

    def _observe(self, mirror: _Mirror, mirrored: Answer) -> None:
        metrics, pair, original = self._metrics, mirror.pair, mirror.original
        for side, answer in (("original", original), ("mirror", mirrored)):
            labels = (*pair, side)
            if answer.ended_s is not None:
                latency = metrics[declared.SHADOW_LATENCY].labels(*labels)
                latency.observe(answer.ended_s - answer.started_s)
            if answer.first_s is not None:
                first = metrics[declared.SHADOW_TIME_TO_FIRST_TOKEN].labels(*labels)
                first.observe(answer.first_s - answer.started_s)
            usage, tokens = answer.usage, metrics[declared.SHADOW_TOKENS]
            assert usage is not None, "an answer that is whole has its usage"
            tokens.labels(*labels, "prompt").inc(usage.prompt_tokens)
            tokens.labels(*labels, "generation").inc(usage.completion_tokens)
            if usage.bitwatt.energy_joules is not None:
                metrics[declared.SHADOW_ENERGY].labels(*labels).inc(usage.bitwatt.energy_joules)
        for index, submit in enumerate(mirror.generation.submits):
            if submit.sampling.temperature == 0 and submit.sampling.max_tokens:
                texts = original.texts.get(index, ""), mirrored.texts.get(index, "")
                metrics[declared.SHADOW_AGREEMENT].labels(*pair).observe(agreement(*texts))
