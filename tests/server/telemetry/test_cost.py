"""The formulas of cost, against figures worked out by hand."""

import pytest
from bitwatt.telemetry.cost import (
    gco2_per_million_tokens,
    usd_of_electricity_per_million_tokens,
    usd_of_rent_per_million_tokens,
)


def test_a_million_tokens_take_the_rent_of_the_hours_they_take():
    # 1000 tokens a second are 3.6 million an hour: $3.60 an hour is a dollar a million.
    assert usd_of_rent_per_million_tokens(3.60, 1000) == pytest.approx(1.0)
    # 50 tokens a second take 20,000 s = 5.56 h for a million, at $2.50 an hour.
    assert usd_of_rent_per_million_tokens(2.50, 50) == pytest.approx(13.888889)


def test_electricity_is_energy_times_price_times_the_buildings_overhead():
    # 3.6 J a token are 3.6 MJ a million, which is one kWh.
    assert usd_of_electricity_per_million_tokens(3.6, 0.20, 1.0) == pytest.approx(0.20)
    # 0.455 J a token: 0.12639 kWh, at $0.15, of which the building adds 30%.
    assert usd_of_electricity_per_million_tokens(0.455, 0.15, 1.3) == pytest.approx(0.024645833)


def test_carbon_is_energy_times_intensity_times_the_buildings_overhead():
    assert gco2_per_million_tokens(3.6, 400, 1.0) == pytest.approx(400)
    assert gco2_per_million_tokens(0.36, 250, 1.2) == pytest.approx(30)


@pytest.mark.parametrize("tokens_per_s", [0, 0.0, -0.0])
def test_no_tokens_a_second_have_no_price(tokens_per_s):
    assert usd_of_rent_per_million_tokens(3.60, tokens_per_s) is None


def test_what_is_not_set_or_not_measured_gives_nothing():
    assert usd_of_rent_per_million_tokens(None, 100) is None
    for known in [(None, 0.2, 1.0), (1.0, None, 1.0), (1.0, 0.2, None)]:
        assert usd_of_electricity_per_million_tokens(*known) is None
        assert gco2_per_million_tokens(*known) is None


def test_a_price_of_zero_is_a_price():
    assert usd_of_rent_per_million_tokens(0.0, 10) == 0
    assert usd_of_electricity_per_million_tokens(1.0, 0.0, 1.0) == 0
