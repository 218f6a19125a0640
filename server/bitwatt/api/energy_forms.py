"""A request's energy and cost once more, in the forms that existing clients read.

Neuralwatt's: top-level `energy` and `cost` in a response, the comments `: energy {...}` and
`: cost {...}` before a stream's `[DONE]`. GreenJoules': the headers X-Energy-Joules and
X-Energy-Method. `usage.bitwatt` has the same joules, asked for or not.
"""

import time

import msgspec

from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.prices import Prices
from bitwatt.telemetry.request_metrics import head_arrived_s

__all__ = [
    "ENERGY_FIELD",
    "JOULES_HEADER",
    "METHOD_HEADER",
    "EnergyForms",
    "RequestCost",
    "RequestEnergyForm",
]

ENERGY_FIELD = "X-Bitwatt-Energy"
JOULES_HEADER = "X-Energy-Joules"
METHOD_HEADER = "X-Energy-Method"
_JOULES_A_KWH = 3.6e6


class RequestEnergyForm(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took, under Neuralwatt's names.

    energy_joules      as in RequestEnergy; None where it was not measured
    avg_power_watts    joules over the duration
    duration_seconds   from the request's head to the end of its last choice
    attribution_method  as attribution in RequestEnergy
    attribution_ratio  the request's share of the device's joules; not known here, always None
    reason             why there is no figure
    """

    energy_joules: float | None
    energy_kwh: float | None
    avg_power_watts: float | None
    duration_seconds: float | None
    attribution_method: str | None
    attribution_ratio: float | None = None
    reason: str | None = None


class RequestCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost, under Neuralwatt's name.

    request_cost_usd  its electricity, PUE included; the rent of a machine is no one request's
    reason            why there is no figure
    """

    request_cost_usd: float | None
    reason: str | None = None


class EnergyForms:
    """The forms of what the request in hand took, which has ended."""

    def __init__(self, told: RequestEnergy, prices: Prices) -> None:
        self.energy = _energy_of(told)
        self.cost = _cost_of(self.energy, prices)

    def headers(self) -> dict[str, str]:
        """Return the headers; where nothing was measured there are no joules."""
        joules = self.energy.energy_joules
        if joules is None:
            return {METHOD_HEADER: "unavailable"}
        return {
            JOULES_HEADER: f"{joules:.9g}",
            METHOD_HEADER: self.energy.attribution_method or "unknown",
        }

    def within(self, response: msgspec.Struct) -> dict[str, object]:
        """Return the response's fields, with `energy` and `cost` behind them."""
        fields = msgspec.structs.asdict(response)
        told = {name: value for name, value in fields.items() if value is not msgspec.UNSET}
        return told | {"energy": self.energy, "cost": self.cost}

    def comments(self) -> bytes:
        """Return the comments of a stream; what comes next ends their lines."""
        encode = msgspec.json.encode
        return b": energy " + encode(self.energy) + b"\n: cost " + encode(self.cost) + b"\n"


def _energy_of(told: RequestEnergy) -> RequestEnergyForm:
    began_s = head_arrived_s.get()
    duration_s = None if began_s is None else time.perf_counter() - began_s
    joules = told.energy_joules
    return RequestEnergyForm(
        energy_joules=joules,
        energy_kwh=None if joules is None else joules / _JOULES_A_KWH,
        avg_power_watts=joules / duration_s if joules is not None and duration_s else None,
        duration_seconds=duration_s,
        attribution_method=told.attribution,
        reason=told.reason,
    )


def _cost_of(energy: RequestEnergyForm, prices: Prices) -> RequestCost:
    usd = prices.usd_of_electricity(energy.energy_joules)
    reason = None
    if energy.energy_joules is None:
        reason = energy.reason
    elif usd is None:
        reason = "the price of electricity is not set (--usd-per-kwh, --pue)"
    return RequestCost(request_cost_usd=usd, reason=reason)
