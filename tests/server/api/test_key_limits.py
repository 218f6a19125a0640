"""What one key may have at once and a minute."""

import asyncio

import pytest
from bitwatt.api.key_limits import KeyLimits

from tests.fakes import FakeEngine, make_app, make_client

pytestmark = pytest.mark.anyio

ASKED = {"model": "tiny", "prompt": "the", "max_tokens": 4}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def post(client, key, **changes):
    headers = {"authorization": f"Bearer {key}"}
    return client.post("/v1/completions", json=ASKED | changes, headers=headers)


def assert_refused(response, knob):
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert error["type"] == "rate_limit_error"
    assert knob in error["message"]


async def test_a_key_with_its_requests_open_is_refused_and_another_is_served():
    going = asyncio.Event()
    engine = FakeEngine(gate=going)
    app = make_app(engine, api_key="a,b", max_open_requests_per_key=2)
    async with make_client(app) as client:
        held = [asyncio.create_task(post(client, "a", stream=index == 1)) for index in range(2)]
        async with asyncio.timeout(60):
            while len(engine.submitted) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert_refused(await post(client, "a"), "--max-open-requests-per-key")
        other = asyncio.create_task(post(client, "b"))
        going.set()
        assert (await other).status_code == 200
        assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
        assert (await post(client, "a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_that_has_used_its_tokens_is_refused_and_another_is_served(stream):
    app = make_app(api_key="a,b", tokens_per_minute_per_key=3)
    async with make_client(app) as client:
        assert (await post(client, "a", stream=stream)).status_code == 200
        assert_refused(await post(client, "a"), "--tokens-per-minute-per-key")
        assert (await post(client, "b")).status_code == 200
        models = await client.get("/v1/models", headers={"authorization": "Bearer a"})
        assert models.status_code == 200


async def test_a_request_that_is_wrong_costs_its_key_nothing():
    app = make_app(api_key="a", tokens_per_minute_per_key=1)
    async with make_client(app) as client:
        for _ in range(3):
            assert (await post(client, "a", model="other")).status_code == 404
        assert (await post(client, "a")).status_code == 200


def test_tokens_come_back_at_the_rate_and_no_more_than_a_minutes_are_saved():
    clock = Clock()
    limits = KeyLimits(max_requests=None, tokens_per_minute=60, clock=clock)
    assert limits.wait_s(b"a") == 0
    limits.charge(b"a", 70)
    assert limits.wait_s(b"a") == pytest.approx(11)
    clock.now_s += 10.5
    assert limits.wait_s(b"a") == pytest.approx(0.5)
    clock.now_s += 1000
    limits.charge(b"a", 60)
    assert limits.wait_s(b"a") == pytest.approx(1)


@pytest.mark.parametrize("knob", ["max_open_requests_per_key", "tokens_per_minute_per_key"])
def test_limits_of_keys_without_keys_are_refused(knob):
    with pytest.raises(ValueError, match="need keys"):
        make_app(**{knob: 1})
