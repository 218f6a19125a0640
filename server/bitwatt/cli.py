"""The command `bitwatt`."""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

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
from bitwatt.completion import Shell, completion_script
from bitwatt.gpus import why_no_gpu
from bitwatt.hub import HubModel, fetch, named
from bitwatt.knobs import Settings, knobs_of, new_cli_source
from bitwatt.mistakes import did_you_mean, unknown_variables
from bitwatt.model.card import quality_told
from bitwatt.model.config import Weights
from bitwatt.model_files import ConvertSettings, InspectSettings, run_convert, run_inspect
from bitwatt.settings import ServeSettings
from bitwatt.studies import (
    EvalSettings,
    PaperSettings,
    TrainSettings,
    run_eval,
    run_paper,
    run_train,
)

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, type[Settings]] = {
    "serve": ServeSettings,
    "compare": CompareSettings,
    "chat": ChatSettings,
    "tune": TuneSettings,
    "train": TrainSettings,
    "eval": EvalSettings,
    "paper": PaperSettings,
    "inspect": InspectSettings,
    "convert": ConvertSettings,
}
"""The settings of each command, by its name."""

_POSITIONAL = ("path", "destination", "out", "url", "url-a", "url-b")

S = TypeVar("S", bound=Settings)

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
    print_completion: Shell | None = Field(
        None, description="Print the script by which this shell completes commands and flags"
    )
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
    train: CliSubCommand[TrainSettings] = Field(
        description="Train a small ternary model, or its 16-bit twin, and export it"
    )
    eval: CliSubCommand[EvalSettings] = Field(
        description="Measure a model's perplexity, answers, agreement, memory and speed"
    )
    paper: CliSubCommand[PaperSettings] = Field(
        description="Rerun the paper's tables of memory, latency, throughput and energy here"
    )

    inspect: CliSubCommand[InspectSettings] = Field(
        description="Say what a model's files hold, and what serving them will take"
    )
    convert: CliSubCommand[ConvertSettings] = Field(
        description="Write a model as a Hugging Face folder, ternary or in 16 bits"
    )

    def cli_cmd(self) -> None:
        """Run what was asked for."""
        if self.version:
            print(f"bitwatt {__version__}")
        elif self.print_completion is not None:
            sys.exit(_print_completion(self.print_completion))
        elif self.serve is not None:
            sys.exit(serve(self.serve))
        elif self.compare is not None:
            sys.exit(_with_warnings(run_compare, self.compare))
        elif self.chat is not None:
            sys.exit(_with_warnings(run_chat, self.chat))
        elif self.tune is not None:
            sys.exit(_with_warnings(run_tune, self.tune))
        elif self.train is not None:
            sys.exit(_with_warnings(run_train, self.train))
        elif self.eval is not None:
            sys.exit(_with_warnings(run_eval, self.eval))
        elif self.paper is not None:
            sys.exit(_with_warnings(run_paper, self.paper))
        elif self.inspect is not None:
            sys.exit(_with_warnings(run_inspect, self.inspect))
        elif self.convert is not None:
            sys.exit(_with_warnings(run_convert, self.convert))
        else:
            sys.exit("bitwatt: a command is needed; see bitwatt --help")


class ModelSpec(NamedTuple):
    """A model to serve."""

    name: str
    path: Path
    weights: Weights


def models_to_serve(settings: ServeSettings) -> list[ModelSpec]:
    """Return what the settings ask for; the embedded pair where they name no model.

    Raises  HubError where a model of the hub can't be had
    """
    if settings.path is None:
        ternary = ModelSpec("builtin", builtin.TERNARY, "ternary")
        twin = ModelSpec("builtin-twin", builtin.FP16, "dense")
        if not builtin.FP16.is_dir():  # as in a wheel
            twin = ModelSpec("builtin-fp16", builtin.TERNARY, "dense")
        return [ternary, twin] if settings.serves_pair else [ternary]
    path = fetch(settings.path)
    path = path.resolve() if path.is_dir() else path.absolute()  # a file's link has its name
    source = named(settings.path)
    name = settings.served_model_name
    if name is None:
        name = path.name.removesuffix(".gguf")
        name = source.repository if isinstance(source, HubModel) else name
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
    for told in _unknown_variables():
        logger.warning("%s", told)
    reason = None if settings.backend == "fake" else why_no_gpu(settings.device)
    if reason is not None:
        logger.error("--device %s: %s", settings.device, reason)
        return 1
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
        try:
            return _serve_on(sockets, settings)
        except KeyboardInterrupt:
            return 130


def _print_completion(shell: Shell) -> int:
    parser = new_cli_source(Bitwatt, COMMANDS).root_parser
    try:
        print(completion_script(parser, shell))
    except ImportError:
        print("bitwatt: completion needs shtab: pip install 'bitwatt[completion]'", file=sys.stderr)
        return 1
    return 0


def _with_warnings(run: Callable[[S], int], settings: S) -> int:
    for told in _unknown_variables():
        print(f"bitwatt: {told}", file=sys.stderr)
    return run(settings)


def _unknown_variables() -> list[str]:
    known = [
        settings.variable(knob.name)
        for settings in COMMANDS.values()
        for knob in knobs_of(settings)
    ]
    return unknown_variables(os.environ, known)


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

    if not settings.key_digests and not settings.is_loopback:
        logger.warning("anyone who reaches %s is served: no --api-key-file is set", settings.host)
    if _shows_a_key(sys.argv):
        logger.warning(
            "everyone on this machine can read the key in the list of processes: "
            "use --api-key-file or BITWATT_API_KEY"
        )
    metrics = Metrics()
    meters = EnergyMeters(settings.energy_source, metrics)
    served: dict[str, ServedModel] = {}
    try:
        for name, path, weights in models_to_serve(settings):
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
                    settings.engine_config(path, weights),
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
                quality=quality_told(path),
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
        await server.announce(served)

    app = create_app(
        served, settings, metrics, on_ready=announce, on_start_failure=give_up, tracing=tracing
    )
    server = new_server(app, settings)
    # The server drains on SIGTERM and then raises it again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    gc.collect()
    gc.freeze()  # what is loaded stays loaded; collections need not look at it
    server.run(sockets)
    return 1 if failed or not server.started else 0


def _shows_a_key(args: Sequence[str]) -> bool:
    """Return whether one of the keys that --api-key gives is no digest."""
    given = [arg.partition("=")[2] for arg in args if arg.startswith("--api-key=")]
    given += [value for flag, value in pairwise(args) if flag == "--api-key"]
    keys = (key.strip() for value in given for key in value.split(","))
    return any(key and not key.startswith("sha256:") for key in keys)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; leave with status 2 where it is wrong."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        told = did_you_mean(given[0], COMMANDS) or f": there are {', '.join(COMMANDS)}"
        print(f"bitwatt: {given[0]!r} is no command{told}", file=sys.stderr)
        sys.exit(2)
    try:
        CliApp.run(
            Bitwatt,
            cli_args=given,
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
    command = names.pop(0) if names and names[0] in COMMANDS else "serve"
    if not names:
        return message
    name = names[0].replace("_", "-")
    flag = name.upper() if name in _POSITIONAL else f"--{name}"
    is_shown = not name.startswith("api-key") and not isinstance(value, dict)  # of one that lacks
    shown = f" {str(value)[:80]!r}" if is_shown else ""
    variable = COMMANDS[command].variable(names[0].replace("-", "_"))
    return f"{flag}{shown}: {message} ({variable})"
