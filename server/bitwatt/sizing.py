"""The command that says what a traffic takes: plan."""

import asyncio
import json
import math
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import httpx
from bitwatt_client.errors import ClientError
from bitwatt_client.server import Server, new_http_client
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from bitwatt.addresses import checked_url
from bitwatt.errors import BitwattError
from bitwatt.knobs import Settings, Shown
from bitwatt.quantities import read_count
from bitwatt.settings import ServeSettings

__all__ = ["PlanSettings", "checked_lengths", "run_plan"]

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it
_EXPECTED = (BitwattError, ClientError, httpx.HTTPError, OSError)
_UTILIZATIONS = (0.3, 0.6, 0.85)  # of the requests a second that a machine bears at all
_MEASURED_LENGTHS = 1000

_Tokens = Annotated[int, BeforeValidator(read_count), Shown("TOKENS")]
_Share = Annotated[float, Shown("PERCENT")]
_DEFAULTS = ServeSettings.model_fields


def checked_lengths(written: str) -> str:
    """Return what describes a distribution of tokens; raises ValueError where it doesn't."""
    from bitwatt.simulation.traffic import read_lengths

    read_lengths(written)
    return written


class PlanSettings(Settings):
    """Say how many machines a traffic takes, ternary and in 16 bits, and what they cost.

    The engine's own scheduler is run in simulated time, with step times that were measured: on the
    embedded pair, which is then served and asked for a minute, on a server of yours (--url), or
    before (--steps).
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_PLAN_", cli_prog_name="bitwatt plan")

    groups: ClassVar[dict[str, str]] = {
        "requests_per_second": "Traffic",
        "ttft": "Service level",
        "url": "Step times",
        "max_num_seqs": "Engine, as the server's flags of these names",
        "usd_per_hour": "Prices",
        "spares": "Plan",
        "json_path": "Output",
    }

    requests_per_second: Annotated[float | None, Shown("RATE", "the log's, or else 10")] = Field(
        None, gt=0, le=1e7, description="Requests a second, over all machines"
    )
    prompt_tokens: Annotated[str, BeforeValidator(checked_lengths), Shown("LENGTHS")] = Field(
        "64-256",
        description="Tokens of prompts: 128, 16-256 (uniform) or lognormal:MEDIAN:P95",
    )
    answer_tokens: Annotated[str, BeforeValidator(checked_lengths), Shown("LENGTHS")] = Field(
        "32-96", description="Tokens of answers, written alike"
    )
    log: Annotated[Path | None, Shown("FILE", "Poisson arrivals of these lengths")] = Field(
        None,
        description="Your own traffic in JSON lines: objects with time_s, prompt_tokens and "
        "completion_tokens; in place of the lengths",
    )
    ttft: Annotated[float | None, Shown("SECONDS", "no limit")] = Field(
        1.0, gt=0, le=1e6, description="Seconds to the first token that callers are promised"
    )
    tpot: Annotated[float | None, Shown("SECONDS", "no limit")] = Field(
        0.1, gt=0, le=1e6, description="Seconds of each token after it"
    )
    percentile: _Share = Field(
        95.0, ge=50, le=99.9, description="Percent of the requests that the promise holds for"
    )
    url: Annotated[str | None, Shown("URL", "the embedded pair's, which is started")] = Field(
        None, description="Server to measure, which nobody else asks meanwhile"
    )
    model: Annotated[str | None, Shown("NAME", "the server's first")] = Field(
        None, description="The ternary model there"
    )
    twin: Annotated[str | None, Shown("NAME", "the server's last, if it has two")] = Field(
        None, description="The 16-bit model there"
    )
    twin_url: Annotated[str | None, Shown("URL", "the same")] = Field(
        None, description="Server of the 16-bit model"
    )
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The servers' key", repr=False
    )
    steps: Annotated[Path | None, Shown("FILE")] = Field(
        None,
        description="Step times measured before, in place of a server: of --save-steps, or what "
        "`make bench` prints",
    )
    save_steps: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to write the step times to"
    )
    measure_seconds: Annotated[float, Shown("SECONDS")] = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that measuring a model takes, about: more make the spread less",
    )
    max_num_seqs: Annotated[int, Shown("REQUESTS")] = Field(
        _DEFAULTS["max_num_seqs"].default, ge=1, le=4096, description="Requests that run at once"
    )
    max_num_batched_tokens: _Tokens = Field(
        512,
        ge=1,
        le=1 << 20,
        description="Tokens of one step",
    )
    max_model_len: Annotated[
        int | None, BeforeValidator(read_count), Shown("TOKENS", "the measured server's")
    ] = Field(None, ge=2, description="Tokens of prompt and answer together")
    num_blocks: Annotated[
        int | None,
        BeforeValidator(read_count),
        Shown("BLOCKS", "the measured server's, or else enough for all that run"),
    ] = Field(None, ge=1, description="KV-cache blocks of 16 tokens")
    usd_per_hour: Annotated[float | None, Shown("USD", "unknown, and so is the cost")] = Field(
        None, ge=0, le=1e6, description="Rent of a machine, an hour"
    )
    twin_usd_per_hour: Annotated[float | None, Shown("USD", "the same")] = Field(
        None, ge=0, le=1e6, description="Rent of one of the twin's"
    )
    watts_idle: Annotated[float | None, Shown("WATTS", "unknown, and so are joules")] = Field(
        None, ge=0, le=1e6, description="What a machine draws while no step runs"
    )
    watts_busy: Annotated[float | None, Shown("WATTS", "what was measured")] = Field(
        None, ge=0, le=1e6, description="What it draws while one does"
    )
    twin_watts_busy: Annotated[float | None, Shown("WATTS", "what was measured")] = Field(
        None, ge=0, le=1e6, description="What one of the twin's draws while a step runs"
    )
    usd_per_kwh: Annotated[float | None, Shown("USD", "unknown, and so is the cost")] = Field(
        None, ge=0, le=1e4, description="Price of a kilowatt-hour"
    )
    pue: Annotated[float | None, Shown("RATIO", "unknown, and so is its cost")] = Field(
        None, ge=1, le=100, description="Energy of the building over energy of the device"
    )
    gco2_per_kwh: Annotated[float | None, Shown("GRAMS", "unknown, and so is the CO2")] = Field(
        None, ge=0, le=1e4, description="Grams of CO2 that the grid emits for a kilowatt-hour"
    )
    spares: Annotated[int, Shown("MACHINES")] = Field(
        0, ge=0, le=1000, description="Machines beyond those needed, in case some fail"
    )
    simulated_requests: Annotated[int, BeforeValidator(read_count), Shown("REQUESTS")] = Field(
        2000, ge=100, le=1_000_000, description="Requests simulated at each rate that is tried"
    )
    seed: Annotated[int, Shown("NUMBER")] = Field(0, description="Seed of the simulated traffic")
    validate_seconds: Annotated[float | None, Shown("SECONDS", "nothing is replayed")] = Field(
        None,
        gt=0,
        le=86400,
        description="Replay the traffic to each server once it is measured, at three rates that "
        "take turns, for so long each in all, and say how far the simulation was off",
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the plan to, as JSON"
    )

    @field_validator("url", "twin_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        return None if url is None else checked_url(url)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.steps is not None and (self.url or self.validate_seconds or self.twin_url):
            raise ValueError("--steps is in place of a server: no --url, no --validate-seconds")
        if self.twin_url is not None and self.url is None:
            raise ValueError("--twin-url is the twin's of --url")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"--max-num-seqs {self.max_num_seqs} is more than --max-num-batched-tokens "
                f"{self.max_num_batched_tokens}: every running request advances in a step"
            )
        return self


def run_plan(settings: PlanSettings) -> int:
    """Measure, plan, print the table, write what was asked for; return the exit status."""
    try:
        return asyncio.run(_plan(settings))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
    print(f"bitwatt plan: {told}", file=sys.stderr)
    return 1


def _told(error: Exception) -> str | None:
    """Return what to tell of an error that a server or a file can cause; None of any other."""
    if isinstance(error, ExceptionGroup):  # of requests that ran together: the first tells enough
        expected, others = error.split(_EXPECTED)
        if expected is None or others is not None:
            return None
        error = expected.exceptions[0]
    elif not isinstance(error, _EXPECTED):
        return None
    return str(error) or type(error).__name__


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _plan(settings: PlanSettings) -> int:
    from bitwatt.simulation.pace import PaceMeter
    from bitwatt.simulation.plan import make_plan, plan_as_markdown
    from bitwatt.simulation.step_times import read_measured
    from bitwatt.simulation.traffic import LogTraffic
    from bitwatt.simulation.validation import comparisons_as_markdown

    traffic = _traffic(settings)
    rate = settings.requests_per_second
    if rate is None:
        rate = traffic.requests_per_s if isinstance(traffic, LogTraffic) else 10.0
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(new_http_client(max_connections=4096))
        http.headers["X-Bitwatt-Shadow"] = "0"  # mirrors would disturb what is measured
        if settings.api_key is not None:
            http.headers["Authorization"] = f"Bearer {settings.api_key}"
        compared: dict[str, Any] = {}
        failed_replays: dict[str, str] = {}
        if settings.steps is not None:
            measured = read_measured(settings.steps)
            models = [_planned(settings, one, is_twin=i > 0) for i, one in enumerate(measured)]
        else:
            models = []
            # Of a server at an address it isn't known which machine it is on.
            meter = stack.enter_context(PaceMeter()) if settings.url is None else None
            for server in await _servers(settings, http, stack):
                one = await _measured(settings, http, server, traffic, meter)
                models.append(_planned(settings, one, is_twin=bool(models)))
                if settings.validate_seconds is not None:  # at once: a machine's speed drifts
                    try:
                        compared[server.model] = await _compared(
                            settings, http, server, models[-1], traffic, meter
                        )
                    except Exception as error:  # the plan and the step times are worth having
                        told = _told(error)
                        if told is None:
                            raise
                        failed_replays[server.model] = told
        if settings.save_steps is not None:
            steps = {"models": [model.measured.as_json() for model in models]}
            settings.save_steps.write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
        plan = make_plan(
            models,
            traffic,
            rate,
            _level(settings),
            num_spares=settings.spares,
            num_requests=settings.simulated_requests,
            seed=settings.seed,
        )
        document = plan.as_json()
        print(plan_as_markdown(plan))
        if compared:
            print(comparisons_as_markdown(compared))
            document["validation"] = {
                name: [one.as_json() for one in ones] for name, ones in compared.items()
            }
    if settings.json_path is not None:
        settings.json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, told in failed_replays.items():
        print(f"bitwatt plan: the replay to {name} failed: {told}", file=sys.stderr)
    is_possible = all(model.need is not None for model in plan.models)
    return 0 if is_possible and not failed_replays else 1


def _level(settings: PlanSettings) -> Any:
    from bitwatt.simulation.capacity import ServiceLevel

    return ServiceLevel(ttft_s=settings.ttft, tpot_s=settings.tpot, percentile=settings.percentile)


def _traffic(settings: PlanSettings) -> Any:
    from bitwatt.simulation.traffic import PoissonTraffic, read_lengths, read_log

    if settings.log is not None:
        return read_log(settings.log)
    return PoissonTraffic(
        read_lengths(settings.prompt_tokens), read_lengths(settings.answer_tokens)
    )


async def _servers(
    settings: PlanSettings, http: httpx.AsyncClient, stack: AsyncExitStack
) -> list[Server]:
    """Return the ternary model's server and the twin's, if there is one."""
    if settings.url is None:
        from bitwatt import builtin
        from bitwatt.simulation.serving import served

        twin = builtin.FP16 if builtin.FP16.is_dir() else builtin.TERNARY
        flags = [
            f"--max-num-seqs={settings.max_num_seqs}",
            f"--max-num-batched-tokens={settings.max_num_batched_tokens}",
            "--max-queue=100000",  # what it bears is to be seen, not where it refuses
        ]
        if settings.max_model_len is not None:
            flags.append(f"--max-model-len={settings.max_model_len}")
        _report("starting the embedded pair …")
        return [
            Server(http, await stack.enter_async_context(served(path, name, flags, weights)), name)
            for path, name, weights in (
                (builtin.TERNARY, "builtin", "ternary"),
                (twin, "builtin-twin", "dense"),
            )
        ]
    ternary = Server(http, settings.url, settings.model or "", api_key=settings.api_key)
    await ternary.choose_model()
    twin_server = Server(
        http, settings.twin_url or settings.url, settings.twin or "", api_key=settings.api_key
    )
    await twin_server.choose_model(first=False)
    is_one = (twin_server.url, twin_server.model) == (ternary.url, ternary.model)
    return [ternary] if is_one else [ternary, twin_server]


async def _measured(
    settings: PlanSettings, http: httpx.AsyncClient, server: Server, traffic: Any, meter: Any
) -> Any:
    from bitwatt.simulation.measure import measure_server

    _report(f"measuring {server.model} …")
    measured = await measure_server(
        http,
        server,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        lengths=_lengths(traffic, settings.seed),
        seconds=settings.measure_seconds,
        meter=meter,
        report=_report,
    )
    _report(
        f"the fitted steps are within {measured.step_times.largest_error:.0%} of those measured"
    )
    return measured


def _lengths(traffic: Any, seed: int) -> list[tuple[int, int]]:
    arrivals = traffic.arrivals(1.0, _MEASURED_LENGTHS, seed)
    return [(one.num_prompt_tokens, one.num_tokens) for one in arrivals]


def _planned(settings: PlanSettings, measured: Any, *, is_twin: bool) -> Any:
    from bitwatt.simulation.fleet_cost import Machine
    from bitwatt.simulation.plan import PlannedModel
    from bitwatt.simulation.replica import Engine

    max_model_len = settings.max_model_len or measured.max_model_len or 4096
    enough = settings.max_num_seqs * math.ceil(max_model_len / 16)
    watts_busy, usd = settings.watts_busy, settings.usd_per_hour
    if is_twin:
        watts_busy = settings.twin_watts_busy
        usd = settings.twin_usd_per_hour if settings.twin_usd_per_hour is not None else usd
    return PlannedModel(
        measured=measured,
        engine=Engine(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
            num_blocks=settings.num_blocks or measured.num_blocks or enough,
        ),
        machine=Machine(
            usd_per_hour=usd,
            watts_idle=settings.watts_idle,
            watts_busy=watts_busy if watts_busy is not None else measured.watts_busy,
            usd_per_kwh=settings.usd_per_kwh,
            pue=settings.pue,
            gco2_per_kwh=settings.gco2_per_kwh,
        ),
    )


async def _compared(
    settings: PlanSettings,
    http: httpx.AsyncClient,
    server: Server,
    model: Any,
    traffic: Any,
    meter: Any,
) -> list[Any]:
    from bitwatt.simulation.closed_loop import saturation
    from bitwatt.simulation.validation import compare_with_server

    step_times = model.measured.step_times
    most = saturation(model.engine, step_times, _lengths(traffic, settings.seed))
    _report(f"replaying to {server.model}, which bears {most:.3g} requests/s …")
    return await compare_with_server(
        http,
        server,
        model.engine,
        step_times,
        traffic,
        [share * most for share in _UTILIZATIONS],
        seconds=settings.validate_seconds or 0.0,
        seed=settings.seed + 1,
        meter=meter,
        probe_s=model.measured.probe_s,
        report=_report,
    )
