"""bitwatt as a Ray Serve deployment: `serve run deploy.ray.app:build`; README.md says how.

Each replica is the application that `bitwatt serve` runs, in a Ray actor in place of a server of
its own: it starts its engines, and ends them when it drains. Settings are BITWATT_… variables, or
the builder's argument `settings`.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from bitwatt.application import Application, new_application
from bitwatt.settings import ServeSettings
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.types import Receive, Scope, Send

__all__ = ["Arguments", "build"]

_RETRY_AFTER_S = 2.0


class Arguments(BaseModel):
    """What `serve run deploy.ray.app:build name=value …` may set.

    settings           of bitwatt serve, as `settings='{"max_queue": 64}'` or an object of a config
                       file; they go before variables
    min_replicas, max_replicas  between which Ray chooses by the requests a replica has
    target_ongoing_requests     of a replica, to which it scales: those that run and wait
    max_ongoing_requests        of a replica at once; others wait in the proxy
    max_queued_requests         that wait in a proxy; then 503 with Retry-After
    num_cpus, num_gpus          of a replica; a fraction shares a GPU, and then joules are unknown
    drain_s            a replica that is taken away has to end its requests
    metrics_dir        where each replica writes its address for Prometheus (file_sd); "" for none
    metrics_host       address that a replica's /metrics listens on
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] | str = Field(default_factory=dict)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: float = Field(32, gt=0)
    max_ongoing_requests: int = Field(128, ge=1)
    max_queued_requests: int = Field(256, ge=1)
    num_cpus: float = Field(2, gt=0)
    num_gpus: float = Field(0, ge=0)
    drain_s: float = Field(60, gt=0)
    metrics_dir: str = "/tmp/bitwatt-metrics"  # noqa: S108
    metrics_host: str = "127.0.0.1"


def build(given: Arguments) -> serve.Application:
    """Return the application for `serve run`.

    Raises  pydantic's ValidationError for a setting that is wrong, before a replica starts
    """
    wanted = given.settings
    options: dict[str, Any] = json.loads(wanted) if isinstance(wanted, str) else dict(wanted)
    if given.num_gpus != int(given.num_gpus) or not given.num_gpus:
        # Replicas that share a counter would each count the whole device's joules.
        options.setdefault("energy_source", "none")
    if not given.num_gpus:
        options.setdefault("num_threads", max(1, int(given.num_cpus)))
    ServeSettings.model_validate(options)
    deployment = serve.deployment(
        name="bitwatt",
        max_ongoing_requests=given.max_ongoing_requests,
        max_queued_requests=given.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=_RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=given.min_replicas,
            max_replicas=max(given.min_replicas, given.max_replicas),
            target_ongoing_requests=given.target_ongoing_requests,
        ),
        graceful_shutdown_timeout_s=given.drain_s,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
    )
    replica = serve.ingress(_new_replica_app(options, given.metrics_dir, given.metrics_host))(
        _Replica
    )
    return deployment(replica).bind()


class _Replica:
    """What Ray asks of a replica beside its requests."""

    async def check_health(self) -> None:
        """Raise where an engine is down for good: Ray then replaces the replica."""
        app: _ReplicaApp | None = getattr(self, "_asgi_app", None)  # which serve.ingress sets
        served = {} if app is None else app.own.served
        down = [name for name, model in served.items() if model.engine.failure]
        if down:
            raise RuntimeError(f"engines are down: {', '.join(down)}")


def _new_replica_app(options: dict[str, Any], metrics_dir: str, metrics_host: str) -> Any:
    """Return the builder that a replica calls; what it makes can't be sent to one."""

    def build_app() -> "_ReplicaApp":
        return _ReplicaApp(options, metrics_dir, metrics_host)

    return build_app


class _ReplicaApp:
    """The application: ready when its engines are, its /metrics at an address of its own."""

    def __init__(self, options: dict[str, Any], metrics_dir: str, metrics_host: str) -> None:
        self.own = new_application(ServeSettings.model_validate(options))
        inner = self.own.app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with inner(app) as state:
                # Ray sends requests once this has begun.
                await asyncio.gather(*(m.engine.wait_ready() for m in self.own.served.values()))
                async with _metrics_served(self.own, metrics_dir, metrics_host):
                    yield state

        self.own.app.router.lifespan_context = lifespan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.own.app(scope, receive, send)


@asynccontextmanager
async def _metrics_served(own: Application, folder: str, host: str) -> AsyncIterator[None]:
    """Serve the application on a port of this replica's own, and write the address for Prometheus.

    Through Ray's proxy each scrape would reach another replica.
    """
    if not folder:
        yield
        return
    name = serve.get_replica_context().replica_tag
    path = Path(folder) / f"{name}.json"
    await asyncio.to_thread(_forget_the_dead, path.parent)
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            _only_metrics(own), lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        # Signals are Ray's.
        serving = asyncio.create_task(server._serve([listener]))
        labels = {"replica": name, "pid": str(os.getpid())}
        await asyncio.to_thread(_write, path, [{"targets": [f"{host}:{port}"], "labels": labels}])
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            server.should_exit = True
            with suppress(asyncio.CancelledError):
                await serving


def _only_metrics(own: Application) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] == "/metrics" else "/not-found"
        await own.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    return app


def _write(path: Path, targets: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(targets))
    partial.replace(path)


def _forget_the_dead(folder: Path) -> None:
    """Remove the addresses of this machine's replicas that were killed."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, IndexError):
            pid = int(json.loads(path.read_text())[0]["labels"]["pid"])
            if not Path(f"/proc/{pid}").exists():
                path.unlink()
