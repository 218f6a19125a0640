"""Energy and cost in the forms of other servers."""

import json

import pytest
from bitwatt.api.energy_forms import EnergyForms
from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.prices import Prices

from tests.fakes import make_app, make_client

pytestmark = pytest.mark.anyio

ASKED = {"model": "tiny", "prompt": "the", "max_tokens": 4}


async def answer(app, wish=None, **changes):
    headers = {} if wish is None else {"x-bitwatt-energy": wish}
    async with make_client(app) as client:
        return await client.post("/v1/completions", json=ASKED | changes, headers=headers)


@pytest.mark.parametrize(
    ("is_set", "wish", "is_told"),
    [(False, None, False), (False, "1", True), (True, None, True), (True, "0", False)],
)
async def test_the_forms_come_where_they_are_asked_for(is_set, wish, is_told):
    response = await answer(make_app(energy_fields=is_set), wish)
    body = response.json()
    assert ("energy" in body, "cost" in body, "x-energy-method" in response.headers) == (
        (is_told,) * 3
    )
    assert "bitwatt" in body["usage"]


async def test_what_was_not_measured_is_null_with_its_reason():
    response = await answer(make_app(), "1")
    body = response.json()
    assert body["energy"]["energy_joules"] is body["cost"]["request_cost_usd"] is None
    assert body["energy"]["reason"]
    assert body["cost"]["reason"]
    assert "x-energy-joules" not in response.headers


async def test_a_stream_has_the_comments_right_before_its_end():
    lines = (await answer(make_app(), "1", stream=True)).text.splitlines()
    energy, cost, done = [line for line in lines if line][-3:]
    assert done == "data: [DONE]"
    assert "energy_kwh" in json.loads(energy.removeprefix(": energy "))
    assert "request_cost_usd" in json.loads(cost.removeprefix(": cost "))


async def test_another_word_than_0_or_1_is_refused():
    assert (await answer(make_app(), "yes")).status_code == 400


def test_measured_joules_are_told_and_priced():
    told = RequestEnergy(energy_joules=3.6e6, energy_source="rapl", attribution="proportional")
    forms = EnergyForms(told, Prices(usd_per_kwh=0.5, pue=2))
    assert forms.energy.energy_kwh == 1
    assert forms.cost.request_cost_usd == 1
    assert forms.headers() == {"X-Energy-Joules": "3600000", "X-Energy-Method": "proportional"}
    assert "--usd-per-kwh" in EnergyForms(told, Prices()).cost.reason
