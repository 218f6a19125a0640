"""A twin that another server has: its figures, what it is asked, and mirrors to it."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
from bitwatt.serving.state import aligned
from bitwatt.telemetry.history import Series
from bitwatt_client.exposition import parse_samples

from tests.fakes import (
    FakeEngine,
    make_client,
    make_info,
    make_served_app,
    make_settings,
    run_server,
)
from tests.server.serving.test_shadow import ASKED, BODY, until

pytestmark = pytest.mark.anyio

STATE = "/bitwatt/v1/comparison"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "fox?"}], "temperature": 0}
BODIES = {
    "/v1/completions": BODY,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "tiny", "input": "fox?", "temperature": 0, "logit_bias": {"5": -1}},
    "/v1/messages": {**CHAT, "max_tokens": 20},
}


@asynccontextmanager
async def run_two(tmp_path, *, twin=None, twin_key=None, given_key=None, **settings):
    """Run `tiny` and, on another server, its twin `tiny-fp16`; yield both and a client."""
    twin_app = make_served_app(
        {"tiny-fp16": twin or FakeEngine(reply="the quick brown cat")},
        **({} if twin_key is None else {"api_key": twin_key}),
    )
    if given_key is not None:
        (tmp_path / "key").write_text(f"sha256:{'0' * 64}\n{given_key}\nanother\n")
        settings["twin_key_file"] = tmp_path / "key"
    async with run_server(twin_app) as twin_url:
        app = make_served_app({"tiny": FakeEngine()}, twin_url=twin_url, **settings)
        async with run_server(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield app, twin_app, client


def counted(app, name, **labels):
    body, _ = app.state.metrics.render()
    return parse_samples(body.decode()).total(name, **labels) or 0


async def test_the_state_has_both_servers_models_and_says_which_is_elsewhere(tmp_path):
    async with run_two(tmp_path, twin_key="k", given_key="k", usd_per_hour=2) as (_, _, client):
        state = (await client.get(STATE)).json()
        own = (await client.get(f"{STATE}?own=true")).json()
    mine, theirs = state["models"]
    assert (mine["name"], mine["is_remote"]) == ("tiny", False)
    assert (theirs["name"], theirs["is_remote"]) == ("tiny-fp16", True)
    assert theirs["engine"]["memory"]["packed_weights_bytes"] == 100
    assert mine["prices"]["usd_per_hour"] == 2
    assert theirs["prices"]["usd_per_hour"] is None
    for series in theirs["history"].values():
        assert len(series) == len(state["time_s"])
    assert state["twin"]["problem"] is None
    assert [model["name"] for model in own["models"]] == ["tiny"]
    assert own["twin"] is None


@pytest.mark.parametrize(
    ("given", "said"), [(None, "it answered 401 (--twin-key-file)"), ("x", "it answered 401")]
)
async def test_a_twin_that_refuses_is_told_of_beside_its_own(tmp_path, given, said):
    async with run_two(tmp_path, twin_key="k", given_key=given) as (_, _, client):
        state = (await client.get(STATE)).json()
    assert [model["name"] for model in state["models"]] == ["tiny"]
    assert said in state["twin"]["problem"]
    assert "http://127.0.0.1" in state["twin"]["url"]


async def test_a_twin_that_is_away_is_told_of_and_this_server_serves_on():
    app = make_served_app({"tiny": FakeEngine()}, twin_url="http://127.0.0.1:9")
    async with make_client(app) as client:
        state = (await client.get(STATE)).json()
        asked = await client.post("/bitwatt/v1/twin/v1/completions", json=BODY)
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert "it can't be reached" in state["twin"]["problem"]
    assert asked.status_code == 503
    assert "127.0.0.1:9" in asked.json()["error"]["message"]


async def test_a_twin_of_the_same_name_is_none():
    twin_app = make_served_app({"tiny": FakeEngine()})
    async with run_server(twin_app) as url:
        app = make_served_app({"tiny": FakeEngine()}, twin_url=url)
        async with run_server(app) as own_url, httpx.AsyncClient(base_url=own_url) as client:
            state = (await client.get(STATE)).json()
    assert "--served-model-name" in state["twin"]["problem"]


async def test_two_servers_that_are_each_others_twin_ask_no_further(tmp_path):
    async with run_two(tmp_path) as (app, twin_app, client):
        twin_app.state.twin = app.state.twin  # which would ask itself
        state = (await client.get(STATE)).json()
    assert [model["name"] for model in state["models"]] == ["tiny", "tiny-fp16"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_twin_is_asked_through_this_server_with_its_own_key(tmp_path, path):
    body = {**(BODY if path == "/v1/completions" else CHAT), "model": "tiny-fp16", "stream": True}
    async with run_two(tmp_path, twin_key="k", given_key="k") as (_, _, client):
        answer = await client.post(f"/bitwatt/v1/twin{path}", json=body)
        refused = await client.post(f"/bitwatt/v1/twin{path}", json={**body, "model": "no"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"model":"tiny-fp16"' in answer.text
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"


async def test_nothing_else_of_the_twin_is_reached_and_nothing_without_one(tmp_path):
    async with run_two(tmp_path) as (_, _, client):
        for path in ("metrics", "v1/models", "tokenize", "v1/../metrics"):
            assert (await client.get(f"/bitwatt/v1/twin/{path}")).status_code in (404, 405)
    async with make_client(make_served_app({"tiny": FakeEngine()})) as client:
        answer = await client.post("/bitwatt/v1/twin/v1/completions", json=BODY)
    assert answer.status_code == 404


async def test_when_the_caller_goes_the_twin_is_told(tmp_path):
    twin = FakeEngine(gate=asyncio.Event())
    async with run_two(tmp_path, twin=twin) as (_, _, client):
        body = {**BODY, "model": "tiny-fp16", "stream": True}
        asking = asyncio.create_task(client.post("/bitwatt/v1/twin/v1/completions", json=body))
        await until(lambda: twin.running)
        asking.cancel()
        await until(lambda: not twin.running)


@pytest.mark.parametrize("path", BODIES)
async def test_a_request_is_mirrored_to_the_other_server_and_compared(tmp_path, path):
    twin = FakeEngine(reply="the quick brown cat")
    async with run_two(tmp_path, twin=twin, twin_key="k", given_key="k") as (app, _, client):
        body = {**BODIES[path], "priority": 0, "seed": 5}
        await client.post(path, json=body, headers=ASKED)
        await until(lambda: counted(app, "bitwatt_shadow_requests_total", outcome="compared"))
        names = {"model_name": "tiny", "mirror_name": "tiny-fp16"}
        assert counted(app, "bitwatt_shadow_latency_seconds_count", side="mirror", **names) == 1
        # "the quick brown " is 16 of 19 characters.
        agreed = counted(app, "bitwatt_shadow_text_agreement_sum", **names)
        assert agreed == pytest.approx(16 / 19)
        tokens = counted(app, "bitwatt_shadow_tokens_total", side="mirror", kind="generation")
        assert tokens == 7
    [mirror] = twin.submitted
    assert mirror.sampling.seed == 5


async def test_a_mirror_waits_for_the_other_servers_callers_and_is_given_up_for_them(tmp_path):
    twin = FakeEngine(gate=asyncio.Event(), info=make_info(device="cuda:0"))
    async with run_two(tmp_path, twin=twin) as (app, twin_app, client):
        callers = twin_app.state.catalog.by_name["tiny-fp16"].callers
        callers.arrive()
        await client.post("/v1/completions", json=BODY, headers=ASKED)
        await asyncio.sleep(0.6)  # twice as long as between two looks
        assert twin.submitted == []
        callers.leave()
        await until(lambda: twin.running)
        callers.arrive()
        await until(lambda: counted(app, "bitwatt_shadow_requests_total", outcome="preempted"))
        await until(lambda: not twin.running)


async def test_a_mirror_that_the_other_server_fails_is_counted_and_not_felt(tmp_path):
    async with run_two(tmp_path, twin=FakeEngine(dies_after=1)) as (app, _, client):
        answer = await client.post("/v1/completions", json=BODY, headers=ASKED)
        assert answer.status_code == 200
        await until(lambda: counted(app, "bitwatt_shadow_requests_total", outcome="failed"))


def series(values):
    return Series(
        generation_tokens_per_s=values,
        prompt_tokens_per_s=values,
        kv_cache_usage=values,
        num_running=values,
        num_waiting=values,
    )


@pytest.mark.parametrize(
    ("theirs_s", "onto_s", "values"),
    [
        ([10.2, 11.2, 12.2], [10.0, 11.0, 12.0], [0, 1, 2]),
        ([9.8, 10.8, 11.8], [10.0, 11.0, 12.0], [0, 1, 2]),
        ([10.2], [9.0, 10.0, 11.0, 12.0], [None, 0, None, None]),
        ([], [1.0], [None]),
        ([1.0], [], []),
    ],
)
def test_another_servers_points_are_put_at_the_nearest_of_ours(theirs_s, onto_s, values):
    found = aligned(series(list(range(len(theirs_s)))), theirs_s, onto_s)
    assert found.num_running == values


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compare": True, "twin_url": "http://a"}, "give 2 twins"),
        ({"twin_url": "a:8000"}, "twin_url"),
        ({"twin_url": "http://user:word@a"}, "twin_url"),
        ({"twin_key_file": "/no/such"}, "can't be read"),
    ],
)
def test_settings_that_name_no_twin_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        make_settings(**given)


def test_a_file_of_digests_has_no_key_for_the_twin(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"sha256:{'0' * 64}\n\n")
    with pytest.raises(ValueError, match=r"a digest .* opens nothing"):
        make_settings(twin_url="http://a", twin_key_file=file)
    file.write_text("k\n")
    settings = make_settings(twin_url="http://a", twin_key_file=file, shadow_percent=5)
    assert settings.twin_key_file == "k"
    assert not settings.serves_pair
    assert "'k'" not in repr(settings)
