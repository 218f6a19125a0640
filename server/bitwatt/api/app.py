"""The application: models in, HTTP out."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from bitwatt import __version__
from bitwatt.api import page
from bitwatt.api.dependencies import IGNORED_FIELDS_HEADER
from bitwatt.api.energy_forms import JOULES_HEADER, METHOD_HEADER
from bitwatt.api.errors import install_error_handlers
from bitwatt.api.json_route import LargeBodyTurns
from bitwatt.api.kept_items import KeptItems
from bitwatt.api.key_limits import KeyLimits, LimitKeys
from bitwatt.api.middleware import (
    CheckHost,
    Gateway,
    HeadAsGet,
    LimitBody,
    LimitOpen,
    RequireKey,
    TraceRequests,
)
from bitwatt.api.openapi import describe_api
from bitwatt.api.routes import (
    chat,
    completions,
    embeddings,
    messages,
    models,
    probes,
    responses,
    state,
    tokenize,
    twin,
)
from bitwatt.api.warm_up import warm_up
from bitwatt.serving.lifecycle import running
from bitwatt.serving.models import Catalog, ServedModel
from bitwatt.serving.remote_twin import RemoteTwin
from bitwatt.serving.shadow import Shadow
from bitwatt.settings import ServeSettings
from bitwatt.telemetry.history import History
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.tracing import Tracing

__all__ = ["create_app"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/health", "/ready", *page.OPEN_PATHS)


def create_app(
    served: Mapping[str, ServedModel],
    settings: ServeSettings,
    metrics: Metrics,
    *,
    on_ready: Callable[[], Awaitable[None]] | None = None,
    on_start_failure: Callable[[str], None] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the application over these models.

    Its lifespan starts and stops the engines, as serving.lifecycle.running does, which calls
    on_ready and on_start_failure.
    """
    answering = (completions, chat, responses, messages, embeddings)
    catalog = Catalog(served)
    history = History(served)
    remote = (
        None
        if settings.twin_url is None
        else RemoteTwin(settings.twin_url, key=settings.twin_key_file, own_names=frozenset(served))
    )
    shadow = Shadow(
        catalog,
        metrics,
        percent=settings.shadow_percent,
        timeout_s=settings.request_timeout,
        twin=remote,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with running(catalog, history, on_ready=on_ready, on_start_failure=on_start_failure):
            await warm_up(app, [resource.router for resource in (*answering, tokenize)])
            shadow.start()
            try:
                yield
            finally:
                await shadow.stop()
                if remote is not None:
                    await remote.close()
        if tracing is not None:
            tracing.close()

    key_limits = KeyLimits(
        max_requests=settings.max_open_requests_per_key,
        tokens_per_minute=settings.tokens_per_minute_per_key,
    )
    open_paths = (*OPEN_PATHS, "/metrics") if settings.metrics_public else OPEN_PATHS
    app = FastAPI(
        title="bitwatt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            *([] if tracing is None else [Middleware(TraceRequests, tracing=tracing)]),
            Middleware(Gateway, metrics=metrics),
            *_host_and_origin(settings),
            Middleware(RequireKey, key_digests=settings.key_digests, open_paths=open_paths),
            Middleware(
                LimitBody, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout
            ),
            Middleware(LimitKeys, limits=key_limits),
            Middleware(LimitOpen, max_open=settings.max_open_requests),
            Middleware(HeadAsGet),
        ],
    )
    app.state.catalog = catalog
    app.state.settings = settings
    app.state.large_body_turns = LargeBodyTurns()
    app.state.metrics = metrics
    app.state.history = history
    app.state.shadow = shadow
    app.state.key_limits = key_limits
    app.state.kept_items = KeptItems(settings.kept_items_bytes)
    app.state.twin = remote
    install_error_handlers(app)
    # The routers' own routes: include_router would build each again, for this application.
    for resource in (models, *answering, tokenize, probes, state, twin, page):
        app.router.routes.extend(resource.router.routes)
    app.openapi = cache(  # type: ignore[method-assign]
        partial(
            describe_api,
            app,
            models=list(served),
            needs_key=bool(settings.key_digests),
            open_paths=open_paths,
            allow_priority=settings.allow_priority,
        )
    )
    return app


def _host_and_origin(settings: ServeSettings) -> list[Middleware]:
    """Return what checks the Host header, and what answers pages of other origins."""
    chosen: list[Middleware] = []
    if (settings.is_loopback or settings.allowed_hosts) and "*" not in settings.allowed_hosts:
        own = f"[{settings.host}]" if ":" in settings.host else settings.host
        hosts = {*LOOPBACK_HOSTS, own.lower(), *settings.allowed_hosts}
        chosen.append(Middleware(CheckHost, hosts=hosts))
    if settings.cors_origins:
        chosen.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=(
                    "Retry-After",
                    "X-Request-Id",
                    IGNORED_FIELDS_HEADER,
                    JOULES_HEADER,
                    METHOD_HEADER,
                ),
            )
        )
    return chosen
