"""The commands compare and tune."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import httpx
from bitwatt_client import (
    ClientError,
    Comparison,
    ComparisonError,
    LoadPlan,
    QualityComparison,
    Server,
    Work,
    as_json,
    as_table,
    compare,
    compare_quality,
    new_http_client,
    quality_as_json,
    quality_as_table,
)
from bitwatt_client.command_line import INTERRUPTED, interruptible, say, wait_while_it_loads
from bitwatt_client.errors import told
from bitwatt_client.plot import save_png
from bitwatt_client.progress import Progress
from bitwatt_client.prompts import DEFAULT_PROMPTS, Line, read_prompts, read_texts
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg, NoDecode, SettingsConfigDict

from bitwatt.addresses import checked_url
from bitwatt.knobs import Settings, Shown
from bitwatt.quantities import read_count

__all__ = [
    "CompareSettings",
    "TuneSettings",
    "run_compare",
    "run_tune",
]


class CompareSettings(Settings):
    """Measure two models under equal work, in alternating windows.

    Give one URL twice for two models of one server.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_CLIENT_", cli_prog_name="bitwatt compare")

    groups: ClassVar[dict[str, str]] = {
        "model_a": "Models",
        "concurrency": "Work",
        "usd_per_hour": "Prices",
        "json_path": "Output",
    }

    url_a: CliPositionalArg[str] = Field(description="Server of the first model")
    url_b: CliPositionalArg[str] = Field(description="Server of the model it is compared with")
    model_a: Annotated[str | None, Shown("NAME", "its server's first")] = Field(
        None, description="The first model"
    )
    model_b: Annotated[str | None, Shown("NAME", "its server's last")] = Field(
        None, description="The second model"
    )
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The servers' key", repr=False
    )
    concurrency: Annotated[int, Shown("REQUESTS")] = Field(
        8, ge=1, le=4096, description="Requests at once"
    )
    requests: Annotated[int, Shown("REQUESTS")] = Field(
        32, ge=1, le=1_000_000, description="Requests of a window"
    )
    windows: Annotated[int, Shown("WINDOWS")] = Field(
        6, ge=1, le=10_000, description="Windows of each model that count"
    )
    warmups: Annotated[int, Shown("WINDOWS")] = Field(
        1, ge=0, le=100, description="Windows of each model dropped before them"
    )
    max_tokens: Annotated[int, BeforeValidator(read_count), Shown("TOKENS")] = Field(
        64, ge=2, description="Tokens of every answer"
    )
    max_window_seconds: Annotated[float, Shown("SECONDS")] = Field(
        600.0, gt=0, description="Seconds after which a window is given up"
    )
    prompts: Annotated[Path | None, Shown("FILE", "a few of the package's own")] = Field(
        None, description="Prompts, one a line, or .jsonl with prompt"
    )
    quality: Annotated[Path | None, Shown("FILE")] = Field(
        None,
        description="Texts, one a line, or .jsonl with prompt or text: compare how likely the two "
        "models hold them, in place of their speed",
    )
    usd_per_hour: Annotated[float | None, Shown("USD", "each server's own")] = Field(
        None, gt=0, le=1e6, description="Rent of the first server, an hour"
    )
    usd_per_hour_b: Annotated[
        float | None, Shown("USD", "the first's, or else the server's own")
    ] = Field(None, gt=0, le=1e6, description="Rent of the second server, an hour")
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the comparison to, as JSON"
    )
    png: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to write a picture to; needs matplotlib"
    )

    check_urls = field_validator("url_a", "url_b")(checked_url)

    @model_validator(mode="after")
    def _draws_windows(self) -> Self:
        if self.quality is not None and self.png is not None:
            raise ValueError("--png draws windows, which --quality has none of")
        return self


def run_compare(settings: CompareSettings) -> int:
    """Measure, print the table, write what was asked for; return the exit status."""
    try:
        if settings.quality is not None:
            return _run_quality(settings, read_texts(settings.quality))
        prompts = DEFAULT_PROMPTS if settings.prompts is None else read_prompts(settings.prompts)
        comparison = asyncio.run(interruptible(_compare(settings, prompts)))
        print(as_table(comparison))
        _write_json(as_json(comparison), settings.json_path)
        if settings.png is not None:
            save_png(comparison, settings.png)
    except (ClientError, httpx.HTTPError, ValueError, OSError) as error:
        say(f"bitwatt compare: {told(error)}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return 0


def _run_quality(settings: CompareSettings, lines: tuple[Line, ...]) -> int:
    try:
        comparison = asyncio.run(interruptible(_compare_quality(settings, lines)))
    except ComparisonError as error:  # a line each
        raise ComparisonError(f"{settings.quality}, {error}") from error
    print(quality_as_table(comparison))
    _write_json(quality_as_json(comparison), settings.json_path)
    return 0


def _write_json(comparison: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")


@asynccontextmanager
async def _pair(settings: CompareSettings) -> AsyncGenerator[tuple[Server, Server]]:
    """Give the two models, which are there and have loaded."""
    async with new_http_client(max_connections=settings.concurrency) as http:
        a = Server(http, settings.url_a, settings.model_a or "", api_key=settings.api_key)
        b = Server(http, settings.url_b, settings.model_b or "", api_key=settings.api_key)
        await a.choose_model()
        await b.choose_model(first=False)
        if (a.url, a.model) == (b.url, b.model):
            raise ClientError(f"both are {a.model} of {a.url}; name two (--model-a, --model-b)")
        for server in (a, b):
            await wait_while_it_loads(server)
        yield a, b


async def _compare_quality(settings: CompareSettings, lines: tuple[Line, ...]) -> QualityComparison:
    async with _pair(settings) as (a, b):
        is_shown = sys.stderr.isatty()

        def show(num_done: int) -> None:
            if is_shown:
                end = "\r\x1b[K" if num_done == 2 * len(lines) else ""
                told = f"\r\x1b[K{num_done} of {2 * len(lines)} texts scored{end}"
                print(told, end="", file=sys.stderr, flush=True)

        return await compare_quality(a, b, lines, concurrency=settings.concurrency, on_text=show)


async def _compare(settings: CompareSettings, prompts: tuple[str, ...]) -> Comparison:
    async with _pair(settings) as (a, b):
        rent_a = settings.usd_per_hour or await a.usd_per_hour()
        rent_b = settings.usd_per_hour_b or settings.usd_per_hour or await b.usd_per_hour()
        plan = LoadPlan(
            work=Work(
                prompts=prompts,
                num_requests=settings.requests,
                concurrency=settings.concurrency,
                max_tokens=settings.max_tokens,
                max_s=settings.max_window_seconds,
            ),
            num_windows=settings.windows,
            num_warmups=settings.warmups,
            usd_per_hour=(rent_a, rent_b),
        )
        num_windows = 2 * (plan.num_warmups + plan.num_windows)
        with Progress(num_windows, settings.requests, sys.stderr) as progress:
            return await compare(
                a, b, plan, on_window=progress.add, on_request=progress.add_request
            )


def _split(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


class TuneSettings(Settings):
    """Time launch configurations of the ternary kernels on this machine's GPU and keep the best."""

    model_config = SettingsConfigDict(env_prefix="BITWATT_TUNE_", cli_prog_name="bitwatt tune")

    shapes: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Shown("OUTxIN[,OUTxIN...]", "those of 2B4T"),
    ] = Field((), description="Sizes of the weights to tune for")
    output: Annotated[Path | None, Shown("FILE", "the package's own")] = Field(
        None, description="File to write"
    )
    jobs: Annotated[int | None, Shown("PROCESSES", "one a processor")] = Field(
        None, ge=1, le=1024, description="Processes that compile"
    )

    @field_validator("shapes")
    @classmethod
    def _are_sizes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        for shape in shapes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
                raise ValueError(f"{shape!r} is not OUTxIN, such as 2560x6912")
        return shapes


def run_tune(settings: TuneSettings) -> int:
    """Tune and return the exit status: 2 where there is no GPU that the kernels run on."""
    from bitwatt_kernels.gpu.tune import BITNET_2B4T, tune_this_gpu

    sizes = [tuple(map(int, shape.split("x"))) for shape in settings.shapes]
    shapes = [(out_features, in_features) for out_features, in_features in sizes]
    return tune_this_gpu(shapes or BITNET_2B4T, output=settings.output, jobs=settings.jobs)
