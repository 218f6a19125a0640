"""The application that settings describe: its models, their engines, what is measured, and HTTP.

`bitwatt serve` runs it under its own server; any other ASGI server may, as deploy/ray does.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitwatt import builtin
from bitwatt.hub import HubModel, fetch, named
from bitwatt.model.card import quality_told
from bitwatt.model.config import Weights
from bitwatt.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from bitwatt.serving.models import ServedModel

__all__ = ["Application", "ModelSpec", "models_to_serve", "new_application"]


class ModelSpec(NamedTuple):
    """A model to serve.

    root      what its files are called: a folder, a GGUF file without the ending, or ORG/NAME
    quantize  whether its linears are ternarized; also of a twin that has the same in 16 bits
    """

    name: str
    path: Path
    weights: Weights
    root: str
    quantize: bool = False


class Application(NamedTuple):
    """The ASGI application and its models, by name. Its lifespan starts and stops their engines."""

    app: "FastAPI"
    served: "dict[str, ServedModel]"


def models_to_serve(settings: ServeSettings) -> list[ModelSpec]:
    """Return what the settings ask for; the embedded pair where they name no model.

    Raises  HubError where a model of the hub can't be had
    """
    if settings.path is None:
        model = ModelSpec("builtin", builtin.TERNARY, "ternary", "builtin")
    else:
        path, root = _located(settings.path)
        name = settings.served_model_name or root
        model = ModelSpec(name, path, settings.weights or "ternary", root, settings.quantize)
    if not settings.serves_pair:
        return [model]
    if settings.twin is not None:
        path, root = _located(settings.twin)
        return [model, ModelSpec(f"{model.name}-twin", path, "dense", root)]
    if settings.path is None and builtin.FP16.is_dir():  # which a wheel lacks
        return [model, ModelSpec("builtin-twin", builtin.FP16, "dense", "builtin-twin")]
    return [model, model._replace(name=f"{model.name}-fp16", weights="dense")]


def _located(source: str) -> tuple[Path, str]:
    """Return where a model is, and what it is called there."""
    path = fetch(source)
    path = path.resolve() if path.is_dir() else path.absolute()  # a file's link has its name
    model = named(source)
    if isinstance(model, HubModel):
        return path, model.repository
    return path, path.name.removesuffix(".gguf")


def new_application(
    settings: ServeSettings,
    *,
    on_ready: Callable[[], Awaitable[None]] | None = None,
    on_start_failure: Callable[[str], None] | None = None,
) -> Application:
    """Return the application of the settings; nothing runs before its lifespan is entered.

    on_ready          awaited once every engine is ready for the first time
    on_start_failure  told the name of each model whose engine can't start
    Raises            BitwattError for a model that can't be had or read, TracingUnavailableError
    """
    # Imported here, for `bitwatt --help` to answer at once.
    from bitwatt.api.app import create_app
    from bitwatt.engine.client import EngineClient
    from bitwatt.serving.models import ServedModel
    from bitwatt.serving.sampling_params import checked_defaults
    from bitwatt.telemetry.metering import EnergyMeters, EngineObserver
    from bitwatt.telemetry.metrics import Metrics
    from bitwatt.telemetry.tracing import Tracing
    from bitwatt.text.processor import TextProcessor

    metrics = Metrics()
    meters = EnergyMeters(settings.energy_source, metrics)
    served: dict[str, ServedModel] = {}
    for name, path, weights, root, quantize in models_to_serve(settings):
        model_metrics = metrics.model(name)
        model_metrics.set_prices(settings.prices)
        energy = meters.model(name, model_metrics)
        observer = EngineObserver(model_metrics, energy)
        text = TextProcessor.from_folder(
            path,
            allow_control_tokens=settings.allow_control_tokens,
            call_format=settings.tool_call_parser,
            thinking_format=settings.reasoning_parser,
        )
        served[name] = ServedModel(
            name=name,
            engine=EngineClient(
                settings.engine_config(path, weights, quantize=quantize),
                name=name,
                max_queue=settings.max_queue,
                load_timeout_s=settings.load_timeout,
                step_timeout_s=settings.step_timeout,
                token_bytes=text.vocabulary.for_grammars,
                on_ready=observer.on_ready,
                on_step=observer.on_step,
                on_down=observer.on_down,
                on_restart=observer.on_restart,
            ),
            text=text,
            metrics=model_metrics,
            energy=energy,
            quality=None if quantize else quality_told(path),  # which is of what it was made of
            root=root,
            sampling_defaults=checked_defaults(
                text.codec.sampling_defaults, path, settings.generation_config
            ),
        )
    tracing = Tracing.to_endpoint(settings.otlp_endpoint) if settings.otlp_endpoint else None
    app = create_app(
        served,
        settings,
        metrics,
        on_ready=on_ready,
        on_start_failure=on_start_failure,
        tracing=tracing,
    )
    return Application(app, served)
