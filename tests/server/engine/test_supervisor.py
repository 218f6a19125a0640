"""Supervision never ends: whatever an engine dies of, or its start fails with, it serves again."""

import asyncio
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path

import pytest
from bitwatt.engine.environment import engine_environment
from bitwatt.engine.messages import EngineConfig
from bitwatt.engine.supervisor import Backoff
from bitwatt.errors import EngineUnavailableError, RequestFailedError

from tests.server.engine.test_client import Engine, collect, make_submit, model_path, started

__all__ = ["model_path"]

pytestmark = pytest.mark.slow


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def kill(engine: Engine) -> int:
    process_id = engine.client.process_id
    assert process_id is not None
    os.kill(process_id, signal.SIGKILL)
    return process_id


def test_ends_in_a_row_are_waited_out_ever_longer_and_a_minute_s_service_forgives_them() -> None:
    backoff = Backoff()
    delays = [backoff.next_s(ready_s) for ready_s in (0, 3, 0, 59, 0, 0, 0, 0)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert backoff.next_s(60) == 0.5
    assert backoff.next_s(0) == 1
    assert all(backoff.next_s(0) <= 20 for _ in range(5000))


def test_an_end_its_delay_the_restart_and_the_readiness_are_logged(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with started(model_path) as engine:
            client = engine.client
            outputs = client.submit(make_submit("chatcmpl-7-0", [1, 2, 3], 4000))
            await anext(outputs)
            assert client.num_restarts == 0
            first = kill(engine)
            with pytest.raises(RequestFailedError, match="SIGKILL"):
                async for _ in outputs:
                    pass
            async with asyncio.timeout(30):
                await client.wait_ready()
            assert client.process_id != first
            assert client.num_restarts == 1

    asyncio.run(scenario())
    lines = [r.getMessage() for r in caplog.records if r.name == "bitwatt.engine.supervisor"]
    down, restart, ready = lines
    assert "status -9 (SIGKILL); it is started again in 0.5 s; it ran 1 requests" in down
    assert re.search(r"chatcmpl-7-0 \(3 prompt tokens, \d+ drawn\)", down)
    assert re.search(r"step known .* with 1 running, 0 waiting and \d+ of", down)
    assert "started again, restart 1" in restart
    assert "serves again" in ready


def test_an_engine_that_raises_says_what(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with started(model_path) as engine:
            async with aclosing(engine.client.submit(make_submit("x", [1], 4000))) as outputs:
                await anext(outputs)
                # A message that no engine that runs understands.
                engine.client._supervisor.send(EngineConfig(model_path="another"))
                # What an engine that has ended left in a full connection would be lost.
                time.sleep(1)  # noqa: ASYNC251 - it is to stop the event loop
                with pytest.raises(RequestFailedError, match=r"RuntimeError.*configured once"):
                    async for _ in outputs:
                        pass
            async with asyncio.timeout(30):
                await engine.client.wait_ready()

    asyncio.run(scenario())
    [raised] = [r for r in caplog.records if r.name == "bitwatt.engine.process"]
    assert raised.getMessage() == "the engine of engine: the engine can't go on"
    assert "RuntimeError: the engine is configured once" in (raised.exc_text or "")


def test_an_engine_that_dies_without_file_descriptors_left_serves_again_once_there_are(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With 1,100 idle connections one death was a permanent outage without a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def starts_failed() -> int:
        return sum("Too many open files" in record.getMessage() for record in caplog.records)

    def take_all(stack: ExitStack) -> None:
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))

    async def scenario() -> None:
        async with started(model_path) as engine:
            with ExitStack() as stack:
                take_all(stack)
                kill(engine)
                await until(lambda: starts_failed() >= 2)
                assert not engine.client.is_healthy
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(30):
                await engine.client.wait_ready()
            assert (await collect(engine, make_submit("x", [1])))[-1].finish_reason == "length"

    try:
        asyncio.run(scenario())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_engine_that_dies_after_its_tmpdir_is_gone_serves_again(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))

    async def scenario() -> None:
        async with started(model_path) as engine:
            shutil.rmtree(folder)
            kill(engine)
            await until(lambda: not engine.client.is_ready)
            async with asyncio.timeout(30):
                await engine.client.wait_ready()
            assert (await collect(engine, make_submit("x", [1])))[-1].finish_reason == "length"

    asyncio.run(scenario())


def test_an_engine_that_hangs_while_it_loads_is_ended_with_the_knob(model_path: Path) -> None:
    async def scenario() -> None:
        engine = Engine(model_path, load_timeout_s=2.0)
        await engine.client.start()
        try:
            await until(lambda: engine.client.process_id)
            assert engine.client.process_id is not None
            os.kill(engine.client.process_id, signal.SIGSTOP)
            async with asyncio.timeout(30):
                with pytest.raises(EngineUnavailableError, match=r"within 2 s \(--load-timeout\)"):
                    await engine.client.wait_ready()
            assert engine.client.process_id is None
        finally:
            await engine.client.stop()

    asyncio.run(scenario())


def test_an_engine_is_not_to_blame_for_a_pause_of_the_api(model_path: Path) -> None:
    """One stopped for longer than --step-timeout once killed its engine on waking."""

    async def scenario() -> None:
        async with started(model_path, step_timeout_s=1.0) as engine:
            before = engine.client.process_id
            async with aclosing(engine.client.submit(make_submit("x", [1], 4000))) as outputs:
                await anext(outputs)
                for _ in range(3):
                    time.sleep(1.5)  # noqa: ASYNC251 - it is to stop the event loop
                    await asyncio.sleep(0.3)
                assert (await anext(outputs)).token_ids
            assert engine.client.process_id == before
            assert engine.client.num_restarts == 0

    asyncio.run(scenario())


_API = """
import asyncio, sys
from bitwatt.engine.client import EngineClient
from bitwatt.engine.messages import EngineConfig

async def main():
    client = EngineClient(EngineConfig(model_path=sys.argv[1], backend="fake"))
    await client.start()
    while client.process_id is None:
        await asyncio.sleep(0.001)
    print(client.process_id, flush=True)
    await client.wait_ready()
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def is_running(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3, 1.0, None])
def test_an_api_that_is_killed_leaves_no_engine_at_any_moment_of_its_loading(
    model_path: Path, after_s: float | None
) -> None:
    api = subprocess.Popen(
        [sys.executable, "-c", _API, str(model_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=engine_environment(),
    )
    assert api.stdout is not None
    with api:
        engine = int(api.stdout.readline())
        if after_s is None:
            assert api.stdout.readline() == "ready\n"
        else:
            time.sleep(after_s)
        assert is_running(engine)
        api.kill()
    deadline = time.monotonic() + 30
    while is_running(engine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(engine)
