"""The twin that a request is mirrored to, and an answer as it is compared."""

import asyncio
import secrets
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from bitwatt.serving.models import Callers, ServedModel
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.usage import Usage
from bitwatt.telemetry.metrics import ModelMetrics

__all__ = ["Answer", "Asked", "Device", "LocalTwin", "Posted", "Twin", "callers_of"]

_LEAST_PRIORITY = 2**31 - 1
_LOOK_AT_STEPS_S = 0.005

Device = tuple[str, str | None]
"""A device's name, and a GPU's UUID."""


class Posted(NamedTuple):
    """A request as it came over the wire."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What the twin is asked, in both forms: a model here takes the one, a server the other."""

    request: GenerationRequest
    posted: Posted
    num_choices: int


@dataclass(slots=True)
class Answer:
    """What one side said and when, in seconds of a monotonic clock; its usage once it is whole."""

    started_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    ended_s: float | None = None
    texts: dict[int, str] = field(default_factory=dict)
    usage: Usage | None = None

    def take(self, index: int, text: str) -> None:
        """Add what is new of a choice."""
        now_s = time.perf_counter()
        if text and self.first_s is None:
            self.first_s = now_s
        self.ended_s = now_s
        self.texts[index] = self.texts.get(index, "") + text


class Twin(Protocol):
    """A model that can be asked what another was asked."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> Device | None:
        """None before its engine has said."""

    @property
    def callers(self) -> Callers: ...

    def has_vocabulary_of(self, model: ServedModel) -> bool:
        """Return whether token ids mean to it what they mean to the model; True where unknown."""

    async def look(self, *, at_once: bool = False) -> None:
        """Bring what is known of its callers up to date, every now and then or at once."""

    async def answer(self, asked: Asked) -> Answer:
        """Return its answer, whole. Cancelling gives it up. Raises BitwattError."""

    async def settle(self) -> None:
        """Wait until the step in which an answer was given up has ended."""


def _device_of(model: ServedModel) -> Device | None:
    """Return the device of the model's engine; None before it has said."""
    info = model.engine.info
    return None if info is None else (info.device, info.device_uuid)


class LocalTwin:
    """A twin that this server serves."""

    def __init__(self, model: ServedModel, aside: ModelMetrics) -> None:
        """Prepare; what mirrors do is counted aside, not among callers' requests."""
        self._model = model
        self._aside = aside

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def device(self) -> Device | None:
        return _device_of(self._model)

    @property
    def callers(self) -> Callers:
        return self._model.callers

    def has_vocabulary_of(self, model: ServedModel) -> bool:
        own, other = self._model.text.vocabulary, model.text.vocabulary
        return own is other or own.literal_bytes == other.literal_bytes

    async def look(self, *, at_once: bool = False) -> None:
        """Do nothing: its callers come by here."""

    async def answer(self, asked: Asked) -> Answer:
        request = replace(
            asked.request,
            request_id=f"shadow-{secrets.token_hex(8)}",
            params=replace(asked.request.params, priority=_LEAST_PRIORITY),
        )
        aside = replace(self._model, metrics=self._aside, callers=Callers())
        generation = await request.for_model(aside)
        answer = Answer()
        async with aclosing(generation.stream()) as deltas:
            async for delta in deltas:
                answer.take(delta.index, delta.text)
        answer.usage = generation.usage
        return answer

    async def settle(self) -> None:
        since_s = time.monotonic()
        model = self._model
        while model.engine.is_ready:
            stats = model.metrics.stats
            num_open = stats.num_running + stats.num_waiting
            if stats.time_s > since_s and num_open <= model.callers.num_open:
                break
            await asyncio.sleep(_LOOK_AT_STEPS_S)


def callers_of(models: Iterable[ServedModel], device: Device | None) -> list[Callers]:
    """Return the callers of each model on that device."""
    return [model.callers for model in models if _device_of(model) == device]
