"""What an operator pays. A price that isn't set has no default: what it would give has no value.

The formulas are where the figures are: here for a request, `deploy/prometheus/rules.yml` for
recorded series, the client's `cost.py` and the page's `cost.js` for windows they measured; one test
holds all to the same cases.
"""

from dataclasses import dataclass

__all__ = ["Prices"]

_JOULES_A_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What an operator pays; None where they did not say.

    usd_per_hour  rent of what one engine runs on: a GPU, or a machine without one
    usd_per_kwh   price of electricity
    pue           power usage effectiveness: energy of the building over energy of the device
    gco2_per_kwh  carbon intensity of the grid, in grams of CO₂ equivalent
    """

    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None
    pue: float | None = None
    gco2_per_kwh: float | None = None

    def usd_of_electricity(self, joules: float | None) -> float | None:
        """Return what the joules cost; None where they or a price are not known."""
        if joules is None or self.usd_per_kwh is None or self.pue is None:
            return None
        return joules / _JOULES_A_KWH * self.usd_per_kwh * self.pue
