"""Where joules are read: a device's own counter, or the reason why there is none.

What can't be measured is not estimated: no zero, no thermal design power times seconds.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "DeviceState",
    "EnergyChoice",
    "EnergyCounter",
    "SourceName",
    "Unavailable",
]

EnergyChoice = Literal["auto", "nvml", "amdsmi", "rapl", "none"]
SourceName = Literal["nvml", "amdsmi", "rapl"]


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a device's energy is not measured.

    reason  a word, for a metric's label
    detail  a sentence, with what would help
    """

    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A GPU at a moment, as its driver tells."""

    index: int
    uuid: str
    name: str
    power_w: float | None
    energy_mj: int
    memory_used_bytes: int


class EnergyCounter(Protocol):
    """A counter of joules. Read from one thread at a time."""

    @property
    def source(self) -> SourceName: ...

    @property
    def device(self) -> str:
        """What the counter covers, no more and no less."""
        ...

    @property
    def poll_s(self) -> float:
        """Seconds between reads, short beside the counter's own cadence."""
        ...

    def read_joules(self) -> float | None:
        """Return joules since some moment in the past; None where the count was lost."""
        ...

    def state(self) -> DeviceState | None:
        """Return the device's state, None where it isn't a GPU or doesn't tell."""
        ...

    def close(self) -> None:
        """Let the counter go."""
        ...
