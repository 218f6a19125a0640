"""What is served: models by name, each behind an engine."""

import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from bitwatt.constraints.checker import GrammarChecker
from bitwatt.engine.messages import EngineInfo, Submit, TokenOutput
from bitwatt.errors import EngineUnavailableError, InvalidRequestError, shorten
from bitwatt.model.card import Quality
from bitwatt.serving.sampling_params import SamplingDefaults
from bitwatt.telemetry.metering import ModelEnergy
from bitwatt.telemetry.metrics import ModelMetrics
from bitwatt.text.processor import TextProcessor

__all__ = ["Callers", "Catalog", "Engine", "ServedModel"]


class Engine(Protocol):
    """An engine as the API sees it; engine.client.EngineClient is one."""

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def is_healthy(self) -> bool: ...

    @property
    def capacity(self) -> int: ...

    @property
    def failure(self) -> str | None: ...

    async def start(self) -> None: ...

    async def wait_ready(self) -> EngineInfo: ...

    def places(self, requests: Sequence[Submit]) -> AbstractContextManager[None]: ...

    def submit(self, request: Submit) -> AsyncGenerator[TokenOutput, None]: ...

    async def stop(self) -> None: ...


@dataclass(slots=True, eq=False)
class Callers:
    """Whether a model has callers: their choices, from before the engine hears of one to its end.

    num_open    run or wait
    left_s      monotonic seconds when one left last
    on_arrival  called when one comes
    """

    num_open: int = 0
    left_s: float = -math.inf
    on_arrival: set[Callable[[], object]] = field(default_factory=set)

    @property
    def quiet_s(self) -> float | None:
        """Seconds since one left; None before the first did."""
        return None if self.left_s == -math.inf else time.monotonic() - self.left_s

    def arrive(self) -> None:
        """Count one that comes."""
        self.num_open += 1
        for tell in list(self.on_arrival):
            tell()

    def leave(self) -> None:
        """Count one that goes."""
        self.num_open -= 1
        self.left_s = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """A model under the name callers know it by.

    quality  what its card says; None where it says nothing
    root     what its files are called; the name it's served by may be another
    sampling_defaults  stand where a request is silent
    grammars  tries those that its answers are to go by
    """

    name: str
    engine: Engine
    text: TextProcessor
    metrics: ModelMetrics
    energy: ModelEnergy = field(default_factory=ModelEnergy)
    callers: Callers = field(default_factory=Callers)
    quality: Quality | None = None
    root: str | None = None
    sampling_defaults: SamplingDefaults = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    grammars: GrammarChecker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammars", GrammarChecker(self.text.vocabulary.for_grammars))

    @property
    def state(self) -> str:
        """One of "ready", "loading", and "down" for an engine that was up or can't start."""
        if self.engine.is_ready:
            return "ready"
        return "loading" if self.engine.is_healthy else "down"

    def require_info(self) -> EngineInfo:
        """Return what the engine says of itself; raises EngineUnavailableError while it's down."""
        info = self.engine.info
        if info is None or not self.engine.is_ready:
            self.metrics.on_rejected("unavailable")
            raise EngineUnavailableError(f"the engine of {self.name} is {self.state}; try again")
        return info


class Catalog:
    """The served models, by name."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.by_name = dict(models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model, by None the first.

        Raises  InvalidRequestError with model_not_found
        """
        if name is None:
            return next(iter(self.by_name.values()))
        try:
            return self.by_name[name]
        except KeyError:
            served = ", ".join(self.by_name)
            raise InvalidRequestError(
                f"model {shorten(name)} is not served here; served are {served}",
                param="model",
                code="model_not_found",
            ) from None
