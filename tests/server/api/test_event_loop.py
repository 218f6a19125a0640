"""Requests are answered on the event loop: none waits for a thread of a pool.

FastAPI runs in a thread whatever is no coroutine function. Each hop waits for the interpreter,
which a busy event loop gives away every 5 ms, and there were five hops a request.
"""

import anyio.to_thread
import pytest

from tests.bodies import REQUESTS
from tests.fakes import FakeEngine, make_app, make_client

pytestmark = pytest.mark.anyio

CALLS = [
    *(
        ("GET", path.replace("{name}", "tiny"), None)
        for path, methods in make_app().openapi()["paths"].items()
        if "get" in methods
    ),
    ("GET", "/", None),
    ("GET", "/openapi.json", None),
    ("GET", "/nowhere", None),
    *(("POST", path, body) for path, body in REQUESTS.items()),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": -1}),
]


async def test_no_route_waits_for_a_pool_s_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []

    async def refuse(function: object, *_: object, **__: object) -> None:
        waited.append(function)
        raise AssertionError(f"{function} ran in a thread")

    async with make_client(make_app(FakeEngine())) as client:
        monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
        for method, path, body in CALLS:
            json = None if body is None else {"model": "tiny", **body}
            response = await client.request(method, path, json=json)
            expected = 404 if path == "/nowhere" else 400 if body and -1 in body.values() else 200
            assert response.status_code == expected, (path, response.text)
    assert not waited
