"""The command `bitwatt`."""

import atexit
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
)

from bitwatt import __version__
from bitwatt.application import new_application
from bitwatt.bench_command import BenchSettings, run_bench_command
from bitwatt.chat_command import ChatSettings, run_chat
from bitwatt.commands import CompareSettings, TuneSettings, run_compare, run_tune
from bitwatt.completion import Shell, completion_script
from bitwatt.engine.environment import engine_environment
from bitwatt.fleets import FleetSettings, run_fleet
from bitwatt.gpus import why_no_gpu
from bitwatt.knobs import Settings, knobs_of, new_cli_source
from bitwatt.mistakes import did_you_mean, unknown_variables
from bitwatt.model_files import ConvertSettings, InspectSettings, run_convert, run_inspect
from bitwatt.settings import ServeSettings
from bitwatt.sizing import PlanSettings, run_plan
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
    "bench": BenchSettings,
    "tune": TuneSettings,
    "train": TrainSettings,
    "eval": EvalSettings,
    "paper": PaperSettings,
    "inspect": InspectSettings,
    "convert": ConvertSettings,
    "plan": PlanSettings,
    "fleet": FleetSettings,
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
    bench: CliSubCommand[BenchSettings] = Field(
        description="Measure an OpenAI-compatible server under load"
    )
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
    plan: CliSubCommand[PlanSettings] = Field(
        description="Say how many machines a traffic takes, ternary and in 16 bits, and their cost"
    )

    fleet: CliSubCommand[FleetSettings] = Field(
        description="Simulate many replicas over a day, by how requests find them"
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
        elif self.bench is not None:
            sys.exit(_with_warnings(run_bench_command, self.bench))
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
        elif self.plan is not None:
            sys.exit(_with_warnings(run_plan, self.plan))
        elif self.fleet is not None:
            sys.exit(_with_warnings(run_fleet, self.fleet))
        else:
            sys.exit("bitwatt: a command is needed; see bitwatt --help")


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
    from bitwatt.api.server import new_server
    from bitwatt.errors import BitwattError
    from bitwatt.telemetry.tracing import TracingUnavailableError

    if not settings.key_digests and not settings.is_loopback:
        logger.warning("anyone who reaches %s is served: no --api-key-file is set", settings.host)
    if _shows_a_key(sys.argv):
        logger.warning(
            "everyone on this machine can read the key in the list of processes: "
            "use --api-key-file or BITWATT_API_KEY"
        )
    failed: list[str] = []

    def give_up(name: str) -> None:
        failed.append(name)
        server.should_exit = True

    async def announce() -> None:
        await server.announce(application.served)

    try:
        application = new_application(settings, on_ready=announce, on_start_failure=give_up)
    except (BitwattError, TracingUnavailableError) as error:
        logger.error("%s", error)
        return 1
    server = new_server(application.app, settings)
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
    if args is None:
        # To look for garbage among what a process ends with takes 0.3 s once it has loaded torch.
        atexit.register(gc.freeze)
        os.environ.update(engine_environment())  # inspect and eval load torch here
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
