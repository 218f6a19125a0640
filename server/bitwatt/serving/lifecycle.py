"""Brings the engines of all models up, says how that went, and takes them down."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from bitwatt.errors import EngineUnavailableError
from bitwatt.serving.models import Catalog, ServedModel
from bitwatt.telemetry.history import INTERVAL_S, History

__all__ = ["running"]

logger = logging.getLogger(__name__)


@asynccontextmanager
async def running(
    catalog: Catalog,
    history: History,
    *,
    on_ready: Callable[[], Awaitable[None]] | None = None,
    on_start_failure: Callable[[str], None] | None = None,
) -> AsyncIterator[None]:
    """Run every model's engine, and keep the history, while the block runs.

    The block is entered when the engines load. on_ready is awaited once all are ready for the
    first time; on_start_failure is told the name of each model whose engine can't start.
    """
    models = list(catalog.by_name.values())

    async def report_all() -> None:
        are_ready = await asyncio.gather(*(_report_start(m, on_start_failure) for m in models))
        if all(are_ready) and on_ready is not None:
            await on_ready()

    tasks = [asyncio.create_task(_keep_history(models, history))]
    try:
        for model in models:
            await model.engine.start()
        tasks.append(asyncio.create_task(report_all()))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.engine.stop() for model in models), return_exceptions=True)
        for model in models:
            model.energy.unbind()
            model.text.close()
            await model.grammars.close()


async def _keep_history(models: list[ServedModel], history: History) -> None:
    while True:
        history.sample({m.name: m.metrics.stats for m in models if m.engine.is_ready})
        await asyncio.sleep(INTERVAL_S)


async def _report_start(model: ServedModel, on_start_failure: Callable[[str], None] | None) -> bool:
    try:
        info = await model.engine.wait_ready()
    except EngineUnavailableError as error:
        logger.error("%s can't start: %s", model.name, error)
        if on_start_failure is not None:
            on_start_failure(model.name)
        return False
    logger.info(
        "%s is ready after %.1f s: %s weights, %s on %s (%s), context %d, "
        "KV cache of %.0f MiB for %d tokens in %s",
        model.name,
        info.load_s,
        info.weights,
        info.backend,
        info.device_name,
        info.dtype,
        info.max_model_len,
        info.memory.kv_cache_bytes / 2**20,
        info.num_blocks * info.block_size,
        info.kv_cache_dtype,
    )
    for notice in (*info.notices, *model.text.vocabulary.notices_for(info.vocab_size)):
        logger.warning("%s: %s", model.name, notice)
    return True
