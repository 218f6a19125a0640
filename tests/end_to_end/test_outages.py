"""Whatever takes an engine down, the server serves again, and each step stands in the log."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.end_to_end.conftest import Server, start_server, stop_server
from tests.extent import TEST_ALL

pytestmark = pytest.mark.slow(90 if TEST_ALL else 20)

NUM_KILLS = 20 if TEST_ALL else 3
AGAIN_S = 60.0


@pytest.fixture(scope="module")
def hampered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with few file descriptors, whose temporary folder is gone, and which logs JSON."""
    folder = tmp_path_factory.mktemp("gone")
    flags = ("--no-compare", "--log-format", "json")
    server = start_server(*flags, max_open_files=200, TMPDIR=str(folder))
    shutil.rmtree(folder)
    yield server
    assert stop_server(server) == 0, "".join(server.log)


def kill_engine(server: Server, by: signal.Signals = signal.SIGKILL) -> bool:
    """Send the engine process the signal; return whether there was one."""
    for process_id in server.engine_ids().values():
        with suppress(ProcessLookupError):
            os.kill(process_id, by)
            return True
    return False


def kill_to_the_end(server: Server, by: signal.Signals = signal.SIGKILL) -> None:
    """Send the engine process the signal, and wait for the server to tell of its end."""
    num_ends = server.logged("is down after")
    assert kill_engine(server, by)
    deadline = time.monotonic() + AGAIN_S
    while server.logged("is down after") == num_ends:
        assert time.monotonic() < deadline, "".join(server.log)
        time.sleep(0.05)


def check_served(server: Server) -> None:
    """Wait until the server serves again, and check that it said how that came about."""
    server.wait_ready(AGAIN_S)
    asked = {"model": "builtin", "prompt": "def ", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 3
    num_ends = server.logged("is down after")
    assert server.logged("; it is started again in ") == num_ends > 0
    assert server.logged("is started again, restart ") == num_ends
    assert server.logged("serves again, loaded in ") > 0


@pytest.fixture(scope="module")
def crashed(hampered: Server) -> Server:
    """The server, which serves again after its engine crashed."""
    kill_to_the_end(hampered, signal.SIGSEGV)
    check_served(hampered)
    return hampered


def test_an_engine_that_dies_after_its_tmpdir_is_gone_serves_again(crashed: Server) -> None:
    """It had no folder for its socket."""
    check_served(crashed)


def test_the_log_of_an_engine_that_crashes_is_json_where_the_server_s_is(crashed: Server) -> None:
    """Its traceback stood between the lines as plain text."""
    lines = [json.loads(line) for line in list(crashed.log)]
    said = "\n".join(line["message"] for line in lines)
    assert "the engine of builtin: Fatal Python error: Segmentation fault" in said
    assert "in run\n" in said
    assert "status -11 (SIGSEGV)" in said


def test_an_engine_that_dies_beside_idle_connections_serves_again(hampered: Server) -> None:
    """1,100 of them took the last file descriptor, and one death was an outage for good."""
    address = ("127.0.0.1", int(hampered.url.rsplit(":", 1)[1]))
    with ExitStack() as idle:
        for _ in range(300):
            with suppress(OSError):
                idle.enter_context(socket.create_connection(address, timeout=5))
        num_served = hampered.logged("serves again")
        kill_to_the_end(hampered)
        deadline = time.monotonic() + AGAIN_S
        while hampered.logged("serves again") == num_served:
            assert time.monotonic() < deadline, "".join(hampered.log)
            time.sleep(0.1)
    check_served(hampered)


def test_an_engine_that_is_killed_over_and_over_serves_again(hampered: Server) -> None:
    """As soon as there is one, while it loads too; for a minute at most, for it waits longer."""
    num_before = hampered.logged("status -9 (SIGKILL)")
    num_kills = 0
    ends = time.monotonic() + 60
    while num_kills < NUM_KILLS and time.monotonic() < ends:
        num_kills += kill_engine(hampered)
        assert httpx.get(f"{hampered.url}/health", timeout=5).status_code in (200, 503)
        time.sleep(0.2)
    check_served(hampered)
    assert hampered.logged("status -9 (SIGKILL)") >= num_before + 2
    assert hampered.logged("ends in a row") >= 1
