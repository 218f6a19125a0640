"""Keys, probes and what is open without a key."""

import hashlib
import re

import pytest

from tests.fakes import FakeEngine, make_app, make_client, make_info

pytestmark = pytest.mark.anyio

KEY = "sk-secret"


def routes_of(app):
    """Return each method and path of every route of the application."""
    return sorted(
        (method, re.sub("{name(:path)?}", "tiny", route.path))
        for route in app.routes
        for method in route.methods
    )


async def status(app, method, path, key=None):
    headers = {} if key is None else {"authorization": key}
    async with make_client(app) as client:
        response = await client.request(method, path, headers=headers)
    if response.status_code == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        kind = ("type", "authentication_error") if "/messages" in path else _CODE
        assert method == "HEAD" or kind in response.json()["error"].items()
    return response.status_code


_CODE = ("code", "invalid_api_key")


async def test_every_route_but_the_probes_wants_a_key():
    app = make_app(api_key=KEY)
    routes = routes_of(app)
    assert ("POST", "/v1/chat/completions") in routes
    for method, path in [
        *routes,
        ("GET", "/nowhere"),
        ("PUT", "/v1/models"),
        ("GET", "http://localhost//health"),
    ]:
        is_open = path in ("/health", "/ready", "/", "/docs")
        assert (await status(app, method, path) == 401) is not is_open, (method, path)
        assert await status(app, method, path, f"Bearer {KEY}") != 401
        if not is_open:
            for wrong in (f"Bearer {KEY}x", "Bearer ", KEY, f"Basic {KEY}", "Bearer " + "é" * 9):
                assert await status(app, method, path, wrong.encode()) == 401


async def test_metrics_are_open_when_they_are_made_public():
    assert await status(make_app(api_key=KEY, metrics_public=True), "GET", "/metrics") == 200
    assert await status(make_app(api_key=KEY, metrics_public=False), "GET", "/metrics") == 401


async def test_without_keys_everyone_is_served():
    assert await status(make_app(), "GET", "/v1/models") == 200


async def test_several_keys_and_hashed_ones_are_taken_and_none_is_kept_in_clear():
    digest = hashlib.sha256(b"second").hexdigest()
    app = make_app(api_key=f"a-clear-key,sha256:{digest}")
    for key in ("a-clear-key", "second"):
        assert await status(app, "GET", "/v1/models", f"bearer {key}") == 200
    assert await status(app, "GET", "/v1/models", f"Bearer sha256:{digest}") == 401
    assert "a-clear-key" not in repr(app.state.settings.model_dump())


@pytest.mark.parametrize("is_apart", [True, False])
async def test_keys_share_a_prefix_cache_unless_they_are_kept_apart(is_apart):
    engine = FakeEngine()
    async with make_client(make_app(engine, api_key="a,b", cache_per_key=is_apart)) as client:
        for key in ("a", "a", "b"):
            for path, asked in (
                ("/v1/completions", {"prompt": "the", "cache_salt": "mine"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
            ):
                response = await client.post(
                    path,
                    json={"model": "tiny", **asked},
                    headers={"authorization": f"Bearer {key}"},
                )
                assert response.status_code == 200
    texts = [submit.cache_salt for submit in engine.submitted[::2]]
    chats = [submit.cache_salt for submit in engine.submitted[1::2]]
    for salts in (texts, chats):
        assert salts[0] == salts[1]
        assert (salts[1] != salts[2]) is is_apart
    assert all(salt.endswith("mine") for salt in texts)


@pytest.mark.parametrize(
    ("engine", "health", "ready"),
    [
        (FakeEngine(), 200, 200),
        (FakeEngine(info=None, is_ready=False), 200, 503),
        (FakeEngine(is_ready=False, is_healthy=False), 503, 503),
        (FakeEngine(info=None, is_ready=False, is_healthy=False), 503, 503),
    ],
    ids=["ready", "loading", "died", "never started"],
)
async def test_probes_tell_loading_from_down(engine, health, ready):
    app = make_app(engine)
    assert await status(app, "GET", "/health") == health
    assert await status(app, "GET", "/ready") == ready


async def test_every_route_that_is_read_takes_head():
    app = make_app()
    paths = {"/"} | {path for method, path in routes_of(app) if method == "GET"}
    assert {"/v1/models", "/metrics"} <= paths
    async with make_client(app) as client:
        for path in paths:
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
        assert (await client.head("/v1/completions")).status_code == 405
        counted = (await client.get("/metrics")).text
    assert 'code="200",handler="/v1/models",method="HEAD",status="2xx"' in counted


@pytest.mark.parametrize(
    ("host", "settings", "expected"),
    [
        ("localhost", {}, 200),
        ("LOCALHOST:8000", {}, 200),
        ("127.0.0.1:8000", {}, 200),
        ("[::1]:8000", {}, 200),
        ("evil.example", {}, 421),
        ("localhost.evil.example:8000", {}, 421),
        ("127.0.0.1.evil.example", {}, 421),
        ("evil.example", {"host": "::1"}, 421),
        ("127.0.0.2:80", {"host": "127.0.0.2"}, 200),
        ("bitwatt.example:443", {"allowed_hosts": "Bitwatt.example, other"}, 200),
        ("evil.example", {"allowed_hosts": "bitwatt.example"}, 421),
        ("evil.example", {"allowed_hosts": "*"}, 200),
        ("evil.example", {"host": "0.0.0.0"}, 200),
        ("evil.example", {"host": "0.0.0.0", "allowed_hosts": "bitwatt.example"}, 421),
        ("localhost", {"host": "0.0.0.0", "allowed_hosts": "bitwatt.example"}, 200),
    ],
)
async def test_a_server_of_this_machine_answers_to_no_other_name(host, settings, expected):
    """A page whose name leads to a loopback address (DNS rebinding) must not read from it."""
    for path in ("/", "/health", "/v1/models"):
        async with make_client(make_app(**settings)) as client:
            response = await client.get(path, headers={"host": host})
        assert response.status_code == expected, path
        if expected == 421:
            assert "--allowed-hosts" in response.json()["error"]["message"]


ORIGIN = {"origin": "https://app.example"}
PREFLIGHT = ORIGIN | {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.mark.parametrize("origins", ["https://app.example", "https://a.example, *"])
async def test_pages_of_the_origins_named_may_call(origins):
    app = make_app(api_key=KEY, cors_origins=origins)
    async with make_client(app) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for key, expected in ((f"Bearer {KEY}", 200), ("Bearer x", 401)):
            response = await client.get("/v1/models", headers=ORIGIN | {"authorization": key})
            assert response.status_code == expected
            assert response.headers["access-control-allow-origin"] in ("*", ORIGIN["origin"])


async def test_pages_of_other_origins_are_told_nothing():
    for app in (make_app(), make_app(cors_origins="https://other.example")):
        async with make_client(app) as client:
            preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
            assert preflight.status_code in (400, 405)
            response = await client.get("/v1/models", headers=ORIGIN)
            for answer in (preflight, response):
                assert "access-control-allow-origin" not in answer.headers


async def test_no_answer_is_guessed_to_be_of_another_type():
    async with make_client(make_app(api_key=KEY)) as client:
        for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere"):
            for headers in ({}, {"authorization": f"Bearer {KEY}"}):
                response = await client.get(path, headers=headers)
                assert response.headers.get_list("x-content-type-options") == ["nosniff"], path


async def test_ready_names_the_models_it_waits_for():
    async with make_client(make_app(FakeEngine(is_ready=False, is_healthy=False))) as client:
        assert (await client.get("/ready")).json()["waiting_for"] == {"tiny": "down"}


async def test_models_are_described_even_while_they_load():
    async with make_client(make_app(FakeEngine(info=None, is_ready=False))) as client:
        assert (await client.get("/v1/models/tiny")).json()["max_model_len"] is None
    async with make_client(make_app(FakeEngine(info=make_info(max_model_len=77)))) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["max_model_len"]) == ("tiny", 77)


async def test_text_becomes_tokens_and_text_again():
    async with make_client(make_app()) as client:

        async def post(path, **body):
            return (await client.post(path, json={"model": "tiny", **body})).json()

        tokens = await post("/tokenize", prompt="the fox", return_token_strs=True)
        assert tokens["token_strs"] == ["the", " fox"]
        assert tokens["count"] == 2
        assert tokens["max_model_len"] == 256
        assert await post("/detokenize", tokens=tokens["tokens"]) == {"prompt": "the fox"}
        chat = await post("/tokenize", messages=[{"role": "user", "content": "a"}])
        text = await post("/detokenize", tokens=chat["tokens"])
        assert text == {"prompt": "<|user|>a<|end|><|assistant|>"}
        assert (await post("/tokenize"))["error"]["param"] == "prompt"
        assert (await post("/detokenize", tokens=[99_999]))["error"]["param"] == "tokens"
        assert (await post("/detokenize", tokens=[-1]))["error"]["param"] == "tokens[0]"


async def test_engines_start_and_stop_with_the_application():
    engine = FakeEngine()
    app = make_app(engine)
    async with app.router.lifespan_context(app):
        assert engine.is_started
    assert not engine.is_started
