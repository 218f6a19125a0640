"""What the engine's core asks of whatever runs a step. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bitwatt.scheduling.scheduler import Plan

__all__ = ["Runner", "StepResult", "StepResultHandle", "TokenLogprobsRow"]

TokenLogprobsRow = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew, one entry a sampling chunk.

    tokens    None where none could be drawn
    logprobs  None where not asked for
    failures  of each None among the tokens, by its index: why, fit for the caller
    """

    tokens: Sequence[int | None]
    logprobs: list[TokenLogprobsRow | None]
    failures: dict[int, str] = field(default_factory=dict)


class StepResultHandle(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Return the result once the device is done; raises what the step raised."""
        ...


class Runner(Protocol):
    """Runs plans in order. The engine's core needs nothing else of a model."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id it takes."""
        ...

    def launch(self, plan: Plan) -> StepResultHandle:
        """Start the plan's step behind those launched before; at most two may be under way."""
        ...

    def close(self) -> None:
        """Release threads and device memory."""
        ...
