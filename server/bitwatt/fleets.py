"""The command that simulates many replicas over a day: fleet."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from bitwatt.errors import BitwattError
from bitwatt.knobs import Settings, Shown
from bitwatt.quantities import read_count
from bitwatt.sizing import checked_lengths

__all__ = ["FleetSettings", "run_fleet"]

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it
_BLOCK_SIZE = 16

_Tokens = Annotated[int, BeforeValidator(read_count), Shown("TOKENS")]
_Lengths = Annotated[str, BeforeValidator(checked_lengths), Shown("LENGTHS")]


class FleetSettings(Settings):
    """Simulate replicas over a day: round robin, two choices and prefix-affine routing.

    Every replica runs the engine's own scheduler and prefix cache in simulated time, with step
    times that `bitwatt plan --save-steps FILE` measured, or `make bench`.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_FLEET_", cli_prog_name="bitwatt fleet")

    groups: ClassVar[dict[str, str]] = {
        "replicas": "Fleet",
        "requests_per_second": "Traffic",
        "mean_time_between_crashes": "Crashes",
        "max_num_seqs": "Engine, as the server's flags of these names",
        "watts_idle": "Joules",
        "json_path": "Output",
    }

    steps: Annotated[CliPositionalArg[Path], Shown("FILE")] = Field(
        description="Step times, of `bitwatt plan --save-steps` or what `make bench` prints"
    )
    model: Annotated[str | None, Shown("NAME", "the file's first")] = Field(
        None, description="The model of them"
    )
    replicas: Annotated[int, Shown("NUMBER")] = Field(
        100, ge=1, le=100_000, description="Replicas; 10,000 take gigabytes and minutes"
    )
    max_open: Annotated[int | None, Shown("REQUESTS", "half of --max-num-seqs")] = Field(
        None, ge=1, description="Open requests at which prefix-affine routing goes elsewhere"
    )
    requests_per_second: Annotated[float | None, Shown("RATE", "one a replica")] = Field(
        None, gt=0, le=1e7, description="Mean requests a second, over all replicas"
    )
    day: Annotated[float, Shown("SECONDS")] = Field(
        60.0, gt=0, le=86400, description="Length of the day, which may be squeezed"
    )
    swing: Annotated[float, Shown("SHARE")] = Field(
        0.6, ge=0, le=1, description="Share by which the rate falls at night and rises at noon"
    )
    prompt_tokens: _Lengths = Field(
        "16-64",
        description="Tokens of prompts behind their beginnings: 128, 16-256 (uniform) or "
        "lognormal:MEDIAN:P95",
    )
    answer_tokens: _Lengths = Field("32-96", description="Tokens of answers, written alike")
    prefixes: Annotated[int, BeforeValidator(read_count), Shown("NUMBER")] = Field(
        1000, ge=1, le=1_000_000, description="Beginnings that prompts share, by Zipf's law"
    )
    prefix_tokens: _Tokens = Field(256, ge=0, le=1 << 20, description="Tokens of each")
    mean_time_between_crashes: Annotated[float | None, Shown("SECONDS", "none crashes")] = Field(
        None, gt=0, le=1e9, description="Seconds between two crashes of a replica, in the mean"
    )
    repair: Annotated[float, Shown("SECONDS")] = Field(
        5.0, ge=0, le=86400, description="Seconds until it serves again"
    )
    max_num_seqs: Annotated[int, Shown("REQUESTS")] = Field(
        16, ge=1, le=4096, description="Requests that run at once on a replica"
    )
    max_num_batched_tokens: _Tokens = Field(512, ge=1, le=1 << 20, description="Tokens of a step")
    max_model_len: Annotated[int, BeforeValidator(read_count), Shown("TOKENS")] = Field(
        1024, ge=2, le=1 << 20, description="Tokens of prompt and answer together"
    )
    num_blocks: Annotated[
        int | None, BeforeValidator(read_count), Shown("BLOCKS", "enough for all that run")
    ] = Field(None, ge=1, description="KV-cache blocks of 16 tokens, a replica")
    watts_idle: Annotated[float | None, Shown("WATTS", "unknown, and so are joules")] = Field(
        None, ge=0, le=1e6, description="What a replica's device draws while no step runs"
    )
    watts_busy: Annotated[float | None, Shown("WATTS", "what was measured")] = Field(
        None, ge=0, le=1e6, description="What it draws while one does"
    )
    percentile: Annotated[float, Shown("PERCENT")] = Field(
        95.0, ge=50, le=99.9, description="Percentile of the times that are told"
    )
    seed: Annotated[int, Shown("NUMBER")] = Field(0, description="Seed of requests and crashes")
    png: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to draw the day into, hour by hour"
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write everything to, as JSON"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"--max-num-seqs {self.max_num_seqs} is more than --max-num-batched-tokens "
                f"{self.max_num_batched_tokens}: every running request advances in a step"
            )
        return self


def run_fleet(settings: FleetSettings) -> int:
    """Simulate the day by each router, print the table, write what was asked for."""
    try:
        return _fleet(settings)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (BitwattError, OSError) as error:
        print(f"bitwatt fleet: {error}", file=sys.stderr)
        return 1


def _fleet(settings: FleetSettings) -> int:
    from bitwatt.simulation.fleet import DayTraffic, Failures, simulate_day
    from bitwatt.simulation.fleet_report import fleet_as_markdown, joules_a_token, save_fleet_png
    from bitwatt.simulation.replica import Engine
    from bitwatt.simulation.step_times import read_measured
    from bitwatt.simulation.traffic import read_lengths

    models = {model.name: model for model in read_measured(settings.steps)}
    name = settings.model or next(iter(models), "")
    if name not in models:
        raise BitwattError(f"{settings.steps} has no model {name}; it has {', '.join(models)}")
    measured = models[name]
    enough = settings.max_num_seqs * -(-settings.max_model_len // _BLOCK_SIZE)
    engine = Engine(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        num_blocks=settings.num_blocks or enough,
        prefix_caching=True,
    )
    traffic = DayTraffic(
        requests_per_s=settings.requests_per_second or float(settings.replicas),
        day_s=settings.day,
        swing=settings.swing,
        prompt_tokens=read_lengths(settings.prompt_tokens),
        answer_tokens=read_lengths(settings.answer_tokens),
        num_prefixes=settings.prefixes,
        prefix_tokens=settings.prefix_tokens,
    )
    failures = Failures(
        mean_time_between_s=settings.mean_time_between_crashes, repair_s=settings.repair
    )
    watts_busy = settings.watts_busy if settings.watts_busy is not None else measured.watts_busy
    print(f"simulating {settings.replicas:,} replicas by each router …", file=sys.stderr)
    runs = simulate_day(
        settings.replicas,
        engine,
        measured.step_times,
        traffic,
        max_open=settings.max_open or max(1, settings.max_num_seqs // 2),
        failures=failures,
        share=settings.percentile,
        seed=settings.seed,
    )
    joules = [
        joules_a_token(
            run,
            num_replicas=settings.replicas,
            day_s=settings.day,
            watts_idle=settings.watts_idle,
            watts_busy=watts_busy,
        )
        for run in runs
    ]
    print(fleet_as_markdown(runs, joules, settings.percentile))
    if settings.png is not None:
        title = f"{settings.replicas:,} replicas of {name}, a day of {settings.day:g} s"
        save_fleet_png(
            runs, settings.png, day_s=settings.day, percentile=settings.percentile, title=title
        )
    if settings.json_path is not None:
        told = [asdict(run) | {"joules_per_token": j} for run, j in zip(runs, joules, strict=True)]
        settings.json_path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0
