"""What the log says of engines that start."""

import asyncio
import logging
import re
from functools import partial

import httpx
import pytest
from bitwatt.api.app import create_app
from bitwatt.api.server import new_server
from bitwatt.telemetry.metrics import Metrics

from tests.bodies import REQUESTS
from tests.fakes import FakeEngine, make_app, make_model, make_settings, run_server

pytestmark = pytest.mark.anyio


class LoadingEngine(FakeEngine):
    """Is ready once it is told so."""

    def __init__(self):
        super().__init__()
        self.loaded = asyncio.Event()

    async def wait_ready(self):
        await self.loaded.wait()
        return await super().wait_ready()


async def logged(caplog, engines, *, load=(), host="127.0.0.1"):
    """Serve the engines, let these load one after the other; return the log and the port."""
    caplog.set_level(logging.INFO, "bitwatt")
    metrics = Metrics()
    models = {
        name: make_model(engine, name=name, metrics=metrics) for name, engine in engines.items()
    }
    settings = make_settings(host=host)

    async def announce():
        await server.announce(models)

    server = new_server(create_app(models, settings, metrics, on_ready=announce), settings)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    for engine in load:
        assert "open http" not in caplog.text
        engine.loaded.set()
        await asyncio.sleep(0.02)
    server.should_exit = True
    await task
    return [r.message for r in caplog.records if r.name.startswith("bitwatt.")], port


async def test_the_start_ends_with_the_address_to_open_and_the_models_names(caplog):
    engines = {"tiny": LoadingEngine(), "tiny-fp16": LoadingEngine()}
    lines, port = await logged(caplog, engines, load=engines.values())
    assert lines[-1] == f"all models are ready (tiny, tiny-fp16): open http://127.0.0.1:{port}/"
    assert len([line for line in lines if "is ready after" in line]) == 2


async def test_an_engine_that_is_ready_before_the_port_is_open_is_announced_too(caplog):
    lines, port = await logged(caplog, {"tiny": FakeEngine()})
    assert lines[-1] == f"all models are ready (tiny): open http://127.0.0.1:{port}/"


async def test_a_server_of_every_network_names_an_address_that_opens(caplog):
    lines, port = await logged(caplog, {"tiny": FakeEngine()}, host="0.0.0.0")
    assert lines[-1].endswith(f"open http://127.0.0.1:{port}/")


async def test_while_a_model_can_not_start_nothing_is_announced(caplog):
    engines = {"tiny": FakeEngine(), "broken": FakeEngine(info=None, failure="no such folder")}
    lines, _ = await logged(caplog, engines)
    assert any(re.search("broken can't start: no such folder", line) for line in lines)
    assert "open http" not in caplog.text


def note_call(calls, name, *_, **__):
    calls.append(name)


async def test_a_first_request_finds_its_route_built_and_nothing_tells_of_that(monkeypatch):
    """FastAPI reads a route's source, and builds what it depends on, with its first request."""
    app = make_app()
    monkeypatch.setattr("fastapi.routing._endpoint_context_cache", {})
    async with run_server(app) as url, httpx.AsyncClient(base_url=url) as client:
        metrics = app.state.metrics.render()[0].decode()
        assert "http_requests_total{" not in metrics
        built = []
        for name in ("get_dependant", "inspect.getsourcelines"):
            note = partial(note_call, built, name)
            monkeypatch.setattr(f"fastapi.routing.{name}", note)
        for path, body in REQUESTS.items():
            answer = await client.post(path, json={"model": "tiny"} | body)
            assert answer.status_code == 200, path
    assert built == []
