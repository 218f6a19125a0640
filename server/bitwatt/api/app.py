"""The application: models in, HTTP out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from bitwatt import __version__
from bitwatt.api import page
from bitwatt.api.errors import install_error_handlers
from bitwatt.api.middleware import Gateway, LimitBody, LimitOpen, RequireKey, TraceRequests
from bitwatt.api.routes import chat, completions, models, probes, state, tokenize
from bitwatt.errors import EngineUnavailableError
from bitwatt.serving.models import Catalog, ServedModel
from bitwatt.serving.shadow import Shadow
from bitwatt.settings import ServeSettings
from bitwatt.telemetry.history import INTERVAL_S, History
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.tracing import Tracing

__all__ = ["create_app"]

OPEN_PATHS = ("/health", "/ready", *page.OPEN_PATHS)

logger = logging.getLogger(__name__)


def create_app(
    served: Mapping[str, ServedModel],
    settings: ServeSettings,
    metrics: Metrics,
    *,
    on_start_failure: Callable[[str], None] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the application over these models.

    Its lifespan starts and stops the engines. on_start_failure is told the name of a model whose
    engine can't start.
    """
    catalog = Catalog(served)
    history = History(served)
    shadow = Shadow(
        catalog, metrics, percent=settings.shadow_percent, timeout_s=settings.request_timeout
    )

    async def keep_history() -> None:
        while True:
            history.sample(
                {
                    name: model.metrics.stats
                    for name, model in served.items()
                    if model.engine.is_ready
                }
            )
            await asyncio.sleep(INTERVAL_S)

    async def report_start(model: ServedModel) -> None:
        try:
            info = await model.engine.wait_ready()
        except EngineUnavailableError as error:
            logger.error("%s can't start: %s", model.name, error)
            if on_start_failure is not None:
                on_start_failure(model.name)
            return
        logger.info(
            "%s is ready after %.1f s: %s weights, %s on %s (%s), context %d, "
            "KV cache of %.0f MiB for %d tokens",
            model.name,
            info.load_s,
            info.weights,
            info.backend,
            info.device_name,
            info.dtype,
            info.max_model_len,
            info.memory.kv_cache_bytes / 2**20,
            info.num_blocks * info.block_size,
        )
        for notice in info.notices:
            logger.warning("%s: %s", model.name, notice)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engines = [model.engine for model in catalog.by_name.values()]
        tasks = [asyncio.create_task(keep_history())]
        shadow.start()
        try:
            for model in catalog.by_name.values():
                await model.engine.start()
                tasks.append(asyncio.create_task(report_start(model)))
            yield
        finally:
            await shadow.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(engine.stop() for engine in engines), return_exceptions=True)
            for model in catalog.by_name.values():
                model.energy.unbind()
                model.text.close()
            if tracing is not None:
                tracing.close()

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
            Middleware(RequireKey, key_digests=settings.api_key, open_paths=open_paths),
            Middleware(LimitOpen, max_open=settings.max_open_requests),
            Middleware(
                LimitBody, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout
            ),
        ],
    )
    app.state.catalog = catalog
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.history = history
    app.state.shadow = shadow
    install_error_handlers(app)
    for resource in (models, completions, chat, tokenize, probes, state, page):
        app.include_router(resource.router)
    return app
