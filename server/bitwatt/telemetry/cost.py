"""What tokens cost: rent, electricity and carbon. A price that isn't set gives None, never a guess.

Rates are over wall-clock time, idle time included: a device is paid for while it waits.
"""

from dataclasses import dataclass

__all__ = [
    "Prices",
    "gco2_per_million_tokens",
    "usd_of_electricity_per_million_tokens",
    "usd_of_rent_per_million_tokens",
]

_MILLION = 1e6
_JOULES_PER_KWH = 3.6e6
_SECONDS_PER_HOUR = 3600


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


def usd_of_rent_per_million_tokens(usd_per_hour: float | None, tokens_per_s: float) -> float | None:
    """Return US dollars per million output tokens at this rate; None at no tokens a second."""
    if usd_per_hour is None or tokens_per_s <= 0:
        return None
    return usd_per_hour / (tokens_per_s * _SECONDS_PER_HOUR) * _MILLION


def usd_of_electricity_per_million_tokens(
    joules_per_token: float | None, usd_per_kwh: float | None, pue: float | None
) -> float | None:
    """Return US dollars per million output tokens; None where the energy was not measured.

    A line of its own: rent usually has it in, so the two are never added.
    """
    if joules_per_token is None or usd_per_kwh is None or pue is None:
        return None
    return joules_per_token * _MILLION / _JOULES_PER_KWH * usd_per_kwh * pue


def gco2_per_million_tokens(
    joules_per_token: float | None, gco2_per_kwh: float | None, pue: float | None
) -> float | None:
    """Return grams of CO₂ equivalent per million output tokens; None where a factor is unknown."""
    if joules_per_token is None or gco2_per_kwh is None or pue is None:
        return None
    return joules_per_token * _MILLION / _JOULES_PER_KWH * gco2_per_kwh * pue
