"""A real `bitwatt serve` with the embedded pair, as a person starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import httpx
import pytest


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]
    reader: Thread

    def engine_ids(self) -> dict[str, int]:
        """Return the engine processes' ids, by the weights they serve."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        ids = [int(pid) for path in children for pid in path.read_text().split()]
        return {str(pid): pid for pid in ids if is_engine(pid)}

    def logged(self, words: str) -> int:
        """Return how many lines of the log have the words."""
        return sum(words in line for line in list(self.log))

    def wait_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "".join(self.log)
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s:\n" + "".join(self.log))

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of the one series of that name with those labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if re.match(rf"{name}(\{{|\s)", line)
            and all(f'{key}="{value}"' in line for key, value in labels.items())
        ]
        assert len(values) == 1, f"{name}{labels}: {values}"
        return values[0]


def is_engine(pid: int) -> bool:
    return b"bitwatt.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes()


def start_server(
    *flags: str,
    python: str = sys.executable,
    max_open_files: int | None = None,
    has_all_cores: bool = False,
    **environment: str,
) -> Server:
    """Start one; its engines compute on one core each where other tests run beside it.

    has_all_cores  of the machine, as without BITWATT_NUM_THREADS
    """
    share = {} if has_all_cores else {"BITWATT_NUM_THREADS": "1"}
    command = [python, "-m", "bitwatt", "serve", "--port", "0", *flags]
    if max_open_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_open_files}; exec "$@"', "sh", *command]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **share, **environment},
    )
    log: list[str] = []
    found: SimpleQueue[str] = SimpleQueue()
    reader = Thread(target=read_log, args=(process, log, found), daemon=True)
    reader.start()
    try:
        url = found.get(timeout=60)
    except Empty:
        url = ""
    server = Server(url, process, log, reader)
    if not server.url:
        stop_server(server)
        raise AssertionError("".join(log))
    server.wait_ready()
    return server


def read_log(process: subprocess.Popen[str], log: list[str], found: SimpleQueue[str]) -> None:
    """Keep the log; put the server's address, or "" if it ends without one."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            log.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                found.put(address.group())
    found.put("")


def stop_server(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(timeout=40)
    server.reader.join(timeout=10)
    return status


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The embedded pair, shared by the tests that leave it as they found it."""
    server = start_server("--allow-priority")  # which random requests ask for
    yield server
    assert stop_server(server) == 0


@pytest.fixture
def own_pair() -> Iterator[Server]:
    """The embedded pair, for one test to mistreat."""
    server = start_server()
    yield server
    if server.process.poll() is None:
        stop_server(server)


@pytest.fixture(scope="session")
def servers_of_one() -> Iterator[list[Server]]:
    """The servers of the embedded ternary model that own_server lent, the last of which may run."""
    servers: list[Server] = []
    yield servers
    if servers and servers[-1].process.poll() is None:
        assert stop_server(servers[-1]) == 0


@pytest.fixture
def own_server(servers_of_one: list[Server]) -> Server:
    """The embedded ternary model, to be mistreated: its engine killed, if it serves again after.

    A test gets the server of the one before, unless that ended it. Its twin would take 3 s to
    start.
    """
    if not servers_of_one or servers_of_one[-1].process.poll() is not None:
        servers_of_one.append(start_server("--no-compare"))
    return servers_of_one[-1]
