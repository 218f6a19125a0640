"""What is served: models by name, each behind an engine."""

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from bitwatt.engine.messages import EngineInfo, Submit, TokenOutput
from bitwatt.errors import EngineUnavailableError, InvalidRequestError, shorten
from bitwatt.telemetry.metering import ModelEnergy
from bitwatt.telemetry.metrics import ModelMetrics
from bitwatt.text.processor import TextProcessor

__all__ = ["Catalog", "Engine", "ServedModel"]


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

    def submit(self, request: Submit) -> AsyncGenerator[TokenOutput, None]: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """A model under the name callers know it by."""

    name: str
    engine: Engine
    text: TextProcessor
    metrics: ModelMetrics
    energy: ModelEnergy = field(default_factory=ModelEnergy)
    created: int = field(default_factory=lambda: int(time.time()))

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

    def find(self, name: str) -> ServedModel:
        """Return the model; raises InvalidRequestError with model_not_found."""
        try:
            return self.by_name[name]
        except KeyError:
            served = ", ".join(self.by_name)
            raise InvalidRequestError(
                f"model {shorten(name)} is not served here; served are {served}",
                param="model",
                code="model_not_found",
            ) from None
