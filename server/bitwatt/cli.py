"""The command `bitwatt`."""

import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
)

from bitwatt import __version__, builtin
from bitwatt.commands import (
    ChatSettings,
    CompareSettings,
    TuneSettings,
    run_chat,
    run_compare,
    run_tune,
)
from bitwatt.knobs import new_cli_source
from bitwatt.model.config import Weights
from bitwatt.settings import ServeSettings

__all__ = ["COMMANDS", "main"]

_ENV_PREFIXES = {
    "serve": "BITWATT_",
    "compare": "BITWATT_CLIENT_",
    "chat": "BITWATT_CLIENT_",
    "tune": "BITWATT_TUNE_",
}
COMMANDS: dict[str, type[BaseSettings]] = {
    "serve": ServeSettings,
    "compare": CompareSettings,
    "chat": ChatSettings,
    "tune": TuneSettings,
}
"""The settings of each command, by its name."""

_POSITIONAL = ("path", "url", "url-a", "url-b")

logger = logging.getLogger(__name__)


class Bitwatt(BaseSettings):
    """An OpenAI-compatible server for ternary language models that measures what they save."""

    model_config = SettingsConfigDict(
        env_prefix="BITWATT_COMMAND_",
        cli_prog_name="bitwatt",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        extra="forbid",
    )

    version: bool = Field(False, description="Print the version and leave")
    serve: CliSubCommand[ServeSettings] = Field(
        description="Serve models with an OpenAI-compatible API and a page that compares them"
    )
    compare: CliSubCommand[CompareSettings] = Field(
        description="Measure two models under equal work, in alternating windows"
    )
    chat: CliSubCommand[ChatSettings] = Field(description="Talk to a served model")
    tune: CliSubCommand[TuneSettings] = Field(
        description="Find the fastest launch configurations of this machine's GPU"
    )

    def cli_cmd(self) -> None:
        """Run what was asked for."""
        if self.version:
            print(f"bitwatt {__version__}")
        elif self.serve is not None:
            sys.exit(serve(self.serve))
        elif self.compare is not None:
            sys.exit(run_compare(self.compare))
        elif self.chat is not None:
            sys.exit(run_chat(self.chat))
        elif self.tune is not None:
            sys.exit(run_tune(self.tune))
        else:
            sys.exit("bitwatt: a command is needed; see bitwatt --help")


class ModelSpec(NamedTuple):
    """A model to serve."""

    name: str
    path: Path
    weights: Weights


def models_to_serve(settings: ServeSettings) -> list[ModelSpec]:
    """Return what the settings ask for; the embedded pair where they name no folder."""
    if settings.path is None:
        folder = Path(builtin.__file__).parent
        pair = [
            ModelSpec("builtin", folder / "ternary", "ternary"),
            ModelSpec("builtin-fp16", folder / "fp16", "dense"),
        ]
        return pair if settings.compare is not False else pair[:1]
    path = settings.path.resolve()
    name = settings.served_model_name or path.name
    models = [ModelSpec(name, path, settings.weights or "ternary")]
    if settings.compare:
        models.append(ModelSpec(f"{name}-fp16", path, "dense"))
    return models


def serve(settings: ServeSettings) -> int:
    """Serve until a signal; return the exit status."""
    # Imported here and below, for `bitwatt --help` to answer at once.
    from bitwatt.api.server import listen
    from bitwatt.telemetry.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    try:
        sockets = listen(settings.host, settings.port)  # a taken port ends it before engines start
    except OSError as error:
        logger.error(
            "can't listen on %s, port %d: %s (--host, --port)",
            settings.host,
            settings.port,
            error.strerror,
        )
        return 1
    with ExitStack() as listening:
        for listener in sockets:
            listening.enter_context(listener)
        return _serve_on(sockets, settings)


def _serve_on(sockets: list[socket.socket], settings: ServeSettings) -> int:
    from bitwatt.api.app import create_app
    from bitwatt.api.server import new_server
    from bitwatt.engine.client import EngineClient
    from bitwatt.errors import BitwattError
    from bitwatt.serving.models import ServedModel
    from bitwatt.telemetry.metering import EnergyMeters, EngineObserver
    from bitwatt.telemetry.metrics import Metrics
    from bitwatt.telemetry.tracing import Tracing, TracingUnavailableError
    from bitwatt.text.processor import TextProcessor

    if not settings.api_key and not settings.is_loopback:
        logger.warning("anyone who reaches %s is served: no --api-key is set", settings.host)
    metrics = Metrics()
    meters = EnergyMeters(settings.energy_source, metrics)
    served: dict[str, ServedModel] = {}
    try:
        for name, path, weights in models_to_serve(settings):
            model_metrics = metrics.model(name)
            model_metrics.set_prices(settings.prices)
            energy = meters.model(name, model_metrics)
            observer = EngineObserver(model_metrics, energy)
            served[name] = ServedModel(
                name=name,
                engine=EngineClient(
                    settings.engine_config(path, weights),
                    name=name,
                    max_queue=settings.max_queue,
                    load_timeout_s=settings.load_timeout,
                    step_timeout_s=settings.step_timeout,
                    on_ready=observer.on_ready,
                    on_step=observer.on_step,
                    on_down=observer.on_down,
                ),
                text=TextProcessor.from_folder(path),
                metrics=model_metrics,
                energy=energy,
            )
        tracing = Tracing.to_endpoint(settings.otlp_endpoint) if settings.otlp_endpoint else None
    except (BitwattError, TracingUnavailableError) as error:
        logger.error("%s", error)
        return 1

    failed: list[str] = []

    def give_up(name: str) -> None:
        failed.append(name)
        server.should_exit = True

    async def announce() -> None:
        await server.announce()

    app = create_app(
        served, settings, metrics, on_ready=announce, on_start_failure=give_up, tracing=tracing
    )
    server = new_server(app, settings)
    # The server drains on SIGTERM and then raises it again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    gc.collect()
    gc.freeze()  # what is loaded stays loaded; collections need not look at it
    try:
        server.run(sockets)
    except KeyboardInterrupt:
        return 130
    return 1 if failed or not server.started else 0


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; leave with status 2 where it is wrong."""
    try:
        CliApp.run(
            Bitwatt,
            cli_args=list(sys.argv[1:] if args is None else args),
            cli_settings_source=new_cli_source(Bitwatt, COMMANDS),
        )
    except ValidationError as error:
        for problem in error.errors():
            print(
                f"bitwatt: {_explain(problem['loc'], problem['msg'], problem['input'])}",
                file=sys.stderr,
            )
        sys.exit(2)
    except SettingsError as error:
        print(f"bitwatt: {error}", file=sys.stderr)
        sys.exit(2)


def _explain(loc: tuple[str | int, ...], message: str, value: object) -> str:
    """Return a line that names the knob, the value and the limit."""
    message = message.removeprefix("Value error, ")
    names = [part for part in loc if isinstance(part, str)]
    prefix = _ENV_PREFIXES["serve"]
    if len(names) > 1 and names[0] in _ENV_PREFIXES:
        prefix = _ENV_PREFIXES[names.pop(0)]
    elif names == ["serve"]:
        names = []
    if not names:
        return message
    name = names[0].replace("_", "-")
    flag = name.upper() if name in _POSITIONAL else f"--{name}"
    shown = "" if name == "api-key" else f" {str(value)[:80]!r}"
    return f"{flag}{shown}: {message} ({prefix}{names[0].upper().replace('-', '_')})"
