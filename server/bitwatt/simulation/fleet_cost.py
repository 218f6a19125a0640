"""How many machines a traffic takes, and what they cost in dollars, joules and CO2 equivalent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitwatt.simulation.capacity import Load, ServiceLevel, capacity

__all__ = ["BreakEven", "FleetCost", "Machine", "Need", "break_even", "cost_of", "need_of"]

_JOULES_A_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine costs and draws; None where nobody said or measured it.

    watts_idle, watts_busy  of the device that computes, while no step runs and while one does
    pue           energy of the building over energy of the device
    """

    usd_per_hour: float | None = None
    watts_idle: float | None = None
    watts_busy: float | None = None
    usd_per_kwh: float | None = None
    pue: float | None = None
    gco2_per_kwh: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Machines for a traffic.

    at_capacity   the most that one machine bears
    num_machines  spares included
    load          of each machine, the traffic split evenly over all; spares take their part
    """

    at_capacity: Load
    num_machines: int
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCost:
    """What the machines cost; None where a price or the watts are not known.

    watts         of all machines together, the building's overhead left out
    """

    usd_per_hour: float | None
    usd_of_electricity_per_hour: float | None
    usd_per_million_tokens: float | None
    watts: float | None
    joules_per_token: float | None
    kg_co2_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Where ternary begins to pay.

    usd_per_hour    rent of a ternary machine at which both cost the same; None without the twin's
    requests_per_s  least rate at which ternary costs less; None where none was found
    """

    usd_per_hour: float | None
    requests_per_s: float | None


def need_of(
    level: ServiceLevel,
    requests_per_s: float,
    load_at: Callable[[float], Load],
    *,
    num_spares: int = 0,
) -> Need | None:
    """Return the machines that bear the rate; None where no number of them meets the level.

    load_at  simulates one machine at a rate, in requests a second
    """
    at_capacity = capacity(level, load_at)
    if at_capacity is None:
        return None
    num_machines = _machines(requests_per_s, at_capacity, num_spares)
    load = load_at(requests_per_s / num_machines)
    return Need(at_capacity=at_capacity, num_machines=num_machines, load=load)


def _machines(requests_per_s: float, at_capacity: Load, num_spares: int) -> int:
    return max(1, math.ceil(requests_per_s / at_capacity.requests_per_s)) + num_spares


def cost_of(need: Need, machine: Machine) -> FleetCost:
    """Return what the machines cost while they bear their load."""
    usd = _times(machine.usd_per_hour, need.num_machines)
    tokens_per_s = need.num_machines * need.load.tokens_per_s
    watts = None
    if machine.watts_idle is not None and machine.watts_busy is not None:
        share = need.load.utilization
        each = share * machine.watts_busy + (1 - share) * machine.watts_idle
        watts = need.num_machines * each
    kwh_per_hour = None  # of the building
    if watts is not None and machine.pue is not None:
        kwh_per_hour = watts * 3600 / _JOULES_A_KWH * machine.pue
    grams = None
    if kwh_per_hour is not None and machine.gco2_per_kwh is not None:
        grams = kwh_per_hour * machine.gco2_per_kwh
    return FleetCost(
        usd_per_hour=usd,
        usd_of_electricity_per_hour=(
            None if kwh_per_hour is None else _times(machine.usd_per_kwh, kwh_per_hour)
        ),
        usd_per_million_tokens=(
            None if usd is None or tokens_per_s <= 0 else usd / (tokens_per_s * 3600) * 1e6
        ),
        watts=watts,
        joules_per_token=None if watts is None or tokens_per_s <= 0 else watts / tokens_per_s,
        kg_co2_per_hour=None if grams is None else grams / 1000,
    )


def _times(price: float | None, amount: float) -> float | None:
    return None if price is None else price * amount


def break_even(
    ternary: Need,
    twin: Need,
    usd_per_hour: float | None,
    twin_usd_per_hour: float | None,
    *,
    num_spares: int = 0,
) -> BreakEven:
    """Return where ternary begins to pay, by rent.

    Without prices a machine of either costs the same. Costs change where a fleet grows by one
    machine, so only just above those rates is looked.
    """
    price = usd_per_hour if usd_per_hour is not None else 1.0
    twin_price = twin_usd_per_hour if twin_usd_per_hour is not None else 1.0
    rent = None
    if twin_usd_per_hour is not None:
        rent = twin_usd_per_hour * twin.num_machines / ternary.num_machines
    rates = [0.0]
    for need in (ternary, twin):
        # Beyond this many machines the ratio of the capacities alone decides.
        rates += [k * need.at_capacity.requests_per_s for k in range(1, 1001)]
    found = None
    for rate in sorted(rates):
        above = math.nextafter(rate, math.inf)
        ours = price * _machines(above, ternary.at_capacity, num_spares)
        theirs = twin_price * _machines(above, twin.at_capacity, num_spares)
        if ours < theirs:
            found = rate
            break
    return BreakEven(usd_per_hour=rent, requests_per_s=found)
