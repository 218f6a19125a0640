"""What the engine's core asks of whatever runs a step. Imports no torch."""

from dataclasses import dataclass
from typing import Protocol

from bitwatt.scheduling.scheduler import Plan

__all__ = ["Runner", "StepResult", "StepResultHandle", "TokenLogprobsRow"]

TokenLogprobsRow = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew, one entry a sampling chunk; logprobs is None where not asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobsRow | None]


class StepResultHandle(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Return the result once the device is done; raises what the step raised."""
        ...


class Runner(Protocol):
    """Runs plans in order. The engine's core needs nothing else of a model."""

    def launch(self, plan: Plan) -> StepResultHandle:
        """Start the plan's step behind those launched before; at most two may be under way."""
        ...

    def close(self) -> None:
        """Release threads and device memory."""
        ...
