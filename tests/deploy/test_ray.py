"""Two replicas under Ray Serve: `pip install -e '.[dev,ray]'`, else these are skipped."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from bitwatt_client.exposition import parse_samples

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
ENDS_S = 90.0


class Cluster:
    """The process of ray_cluster.py."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.metrics = folder / "metrics"
        self._log = (folder / "log").open("w")
        # Ray's sockets lie in its folder, and their paths have some 100 characters at most.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.deploy.ray_cluster",
                self.metrics,
                str(port),
                "/tmp/bwray",
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.wait_for("ready")

    def wait_for(self, words: str) -> None:
        for line in self.process.stdout:
            if line.strip() == words:
                return
        raise AssertionError(f"the cluster ended before {words!r}")

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_replicas(self, count: int) -> None:
        """Wait until there are so many replicas, each of which tells its metrics."""
        deadline = time.monotonic() + ENDS_S
        while not (len(self.targets()) == count and all(map(answers, self.targets().values()))):
            assert time.monotonic() < deadline, self.targets()
            time.sleep(0.2)

    def targets(self) -> dict[str, str]:
        """Return each replica's address for Prometheus, by its label."""
        files = [json.loads(path.read_text()) for path in self.metrics.glob("*.json")]
        return {one["labels"]["replica"]: one["targets"][0] for [one] in files}

    def pids(self) -> list[int]:
        """Return each replica's process."""
        files = [json.loads(path.read_text()) for path in self.metrics.glob("*.json")]
        return [int(one["labels"]["pid"]) for [one] in files]

    def num_open(self) -> float:
        """Return the requests that run or wait on all replicas, as their metrics tell."""
        total = 0.0
        for target in self.targets().values():
            samples = parse_samples(httpx.get(f"http://{target}/metrics").text)
            for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                total += samples.total(name, model_name="builtin") or 0.0
        return total

    def wait_open(self, *, is_any: bool) -> None:
        """Wait until there are open requests, or none."""
        deadline = time.monotonic() + 5
        while bool(self.num_open()) is not is_any:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self._log.close()


def answers(target: str) -> bool:
    try:
        return httpx.get(f"http://{target}/metrics").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The cluster with two replicas, whatever the test before did to it."""
    shared_cluster.tell("scale 2")
    shared_cluster.wait_for("told")
    shared_cluster.wait_replicas(2)
    return shared_cluster


def body(max_tokens: int) -> dict[str, object]:
    return {
        "model": "builtin",
        "prompt": "def ",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def how_it_ends(http: httpx.AsyncClient, url: str, max_tokens: int) -> str:
    """Return done, a status, a stream's error, or broken for one that ended without either."""
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=body(max_tokens)) as response:
            if response.status_code != 200:
                await response.aread()
                again = response.headers.get("retry-after")
                return f"{response.status_code}, again in {again} s"
            text = "".join([part async for part in response.aiter_text()])
    except httpx.TransportError:
        return "broken"
    if found := re.search(r'data: {"error":.*', text):
        return found.group()
    return "done" if text.rstrip().endswith("data: [DONE]") else "broken"


async def all_end(url: str, number: int, max_tokens: int) -> list[str]:
    limits = httpx.Limits(max_connections=number)
    async with (
        httpx.AsyncClient(timeout=ENDS_S, limits=limits) as http,
        asyncio.timeout(ENDS_S),
    ):
        return await asyncio.gather(*(how_it_ends(http, url, max_tokens) for _ in range(number)))


def test_the_sdk_streams_through_ray(cluster):
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model="builtin",
            messages=[{"role": "user", "content": "What does textwrap.dedent do?"}],
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens > 0
    assert "whitespace" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_each_replicas_metrics_have_an_address_and_a_label_of_their_own(cluster):
    targets = cluster.targets()
    assert len(targets) == len(set(targets.values())) == 2
    # Ray asks two replicas how full they are, and takes one that doesn't answer at once for full.
    deadline = time.monotonic() + ENDS_S
    counts = [0.0, 0.0]
    while not all(counts):
        assert time.monotonic() < deadline, f"both should have taken some: {counts}"
        asyncio.run(all_end(cluster.url, 16, 4))
        counts = []
        for target in targets.values():
            samples = parse_samples(httpx.get(f"http://{target}/metrics").text)
            counts.append(samples.total("vllm:generation_tokens_total", model_name="builtin"))
    for target in targets.values():
        assert httpx.get(f"http://{target}/v1/models").status_code == 404


def test_a_client_that_leaves_ends_its_request_in_the_engine(cluster):
    many = body(1000) | {"n": 32}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=many) as response:
        lines = response.iter_lines()  # kept: the response closes with it
        next(lines)
        cluster.wait_open(is_any=True)
    cluster.wait_open(is_any=False)  # 32,000 tokens would take longer than the wait does


def test_more_than_may_wait_are_told_503_and_when_to_come_again(cluster):
    ends = asyncio.run(all_end(cluster.url, 128, 300))
    assert set(ends) == {"done", "503, again in 2 s"}


def test_streams_end_in_answers_or_errors_when_a_replica_is_killed(cluster):
    async def run() -> list[str]:
        streams = asyncio.create_task(all_end(cluster.url, 64, 900))
        await asyncio.sleep(0.5)
        cluster.tell("kill")
        return await streams

    ends = asyncio.run(run())
    assert len(ends) == 64
    assert "done" in ends
    for end in ends:
        assert end in ("done", "broken") or end.startswith(("data: ", "500", "503")), end
    cluster.wait_for("killed")
    cluster.wait_replicas(2)  # Ray starts another, which takes the killed one's address away


def test_a_replica_that_is_taken_away_ends_its_requests_first(cluster):
    async def run() -> list[str]:
        streams = asyncio.create_task(all_end(cluster.url, 8, 900))
        await asyncio.sleep(0.1)
        cluster.tell("scale 1")
        return await streams

    assert asyncio.run(run()) == ["done"] * 8
    cluster.wait_for("told")
    cluster.wait_replicas(1)
