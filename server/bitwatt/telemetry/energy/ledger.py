"""Joules by model and by request: what was measured is posted here, split by split."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from bitwatt.telemetry.energy.attribution import Split

__all__ = ["EnergyLedger", "RequestEnergy", "total_energy"]


class RequestEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took of the device's measured energy.

    energy_joules   gross, idle power of busy moments included; None where it was not measured
    energy_extrapolated_joules  the part of it that the counter has not covered yet: the request's
                                last steps, at the power measured just before them
    attribution     "proportional": its weighted share of the tokens of each step;
                    "proportional_shared": and its engine shares the device with another
    reason          why there is no figure
    """

    energy_joules: float | None = None
    energy_extrapolated_joules: float | None = None
    energy_source: str | None = None
    attribution: str | None = None
    reason: str | None = None


def total_energy(parts: Sequence[RequestEnergy]) -> RequestEnergy:
    """Return the energy of several choices together; no figure where one of them has none."""
    without = next((part for part in parts if part.energy_joules is None), None)
    if without is not None or not parts:
        return without or RequestEnergy(reason="nothing ran")
    return RequestEnergy(
        energy_joules=sum(part.energy_joules or 0.0 for part in parts),
        energy_extrapolated_joules=sum(part.energy_extrapolated_joules or 0.0 for part in parts),
        energy_source=parts[0].energy_source,
        attribution=parts[0].attribution,
    )


class EnergyLedger:
    """Settled joules of models and of open requests. Request ids are unique among the models."""

    def __init__(self) -> None:
        self._busy: dict[str, float] = defaultdict(float)
        self._open: dict[str, float] = {}

    def busy_joules(self, model: str) -> float:
        """Return joules of all the model's steps."""
        return self._busy.get(model, 0.0)

    def open(self, request_id: str) -> None:
        """Begin to keep a request's joules; every open is followed by a close."""
        self._open[request_id] = 0.0

    def close(self, request_id: str) -> float | None:
        """Return the request's joules; None if it was not open."""
        return self._open.pop(request_id, None)

    def post(self, split: Split) -> None:
        """Take in where an interval's joules went."""
        for by_model in (split.prefill, split.decode):
            for model, joules in by_model.items():
                self._busy[model] += joules
        for request_id in self._open.keys() & split.by_request.keys():
            self._open[request_id] += split.by_request[request_id]
