"""The commands beside `bitwatt serve`: compare, chat and tune."""

import asyncio
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
from bitwatt_client import (
    ClientError,
    Comparison,
    LoadPlan,
    Server,
    Window,
    Work,
    as_json,
    as_table,
    compare,
    new_http_client,
)
from bitwatt_client.chat import converse
from bitwatt_client.plot import save_png
from bitwatt_client.prompts import DEFAULT_PROMPTS, read_prompts
from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from bitwatt.knobs import Shown

__all__ = [
    "ChatSettings",
    "CompareSettings",
    "TuneSettings",
    "run_chat",
    "run_compare",
    "run_tune",
]

_CONFIG = SettingsConfigDict(
    env_prefix="BITWATT_CLIENT_",
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
    frozen=True,
    extra="forbid",
)


def _check_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("begins with http:// or https://")
    return url


class CompareSettings(BaseSettings):
    """Measure two models under equal work, in alternating windows.

    Give one URL twice for two models of one server.
    """

    model_config = _CONFIG | SettingsConfigDict(cli_prog_name="bitwatt compare")

    url_a: CliPositionalArg[str] = Field(description="Server of the first model")
    url_b: CliPositionalArg[str] = Field(description="Server of the model it is compared with")
    model_a: Annotated[str | None, Shown("NAME", "its server's first")] = Field(
        None, description="The first model"
    )
    model_b: Annotated[str | None, Shown("NAME", "its server's last")] = Field(
        None, description="The second model"
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
    max_tokens: Annotated[int, Shown("TOKENS")] = Field(
        64, ge=2, description="Tokens of every answer"
    )
    max_window_seconds: Annotated[float, Shown("SECONDS")] = Field(
        600.0, gt=0, description="Seconds after which a window is given up"
    )
    prompts: Annotated[Path | None, Shown("FILE", "a few of the package's own")] = Field(
        None, description="Prompts, one a line, or .jsonl with prompt"
    )
    dollars_per_hour: Annotated[float | None, Shown("USD", "unknown")] = Field(
        None, gt=0, description="Rent of the first server, an hour"
    )
    dollars_per_hour_b: Annotated[float | None, Shown("USD", "the first's")] = Field(
        None, gt=0, description="Rent of the second server, an hour"
    )
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The servers' key", repr=False
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the comparison to, as JSON"
    )
    png: Annotated[Path | None, Shown("FILE")] = Field(
        None, description="File to write a picture to; needs matplotlib"
    )

    check_urls = field_validator("url_a", "url_b")(_check_url)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[Any, ...]:
        """Read no variable for --json: an alias has no prefix, and JSON= is anybody's."""

        def env_without_json() -> dict[str, Any]:
            return {name: value for name, value in env_settings().items() if name != "json"}

        return init_settings, env_without_json


class ChatSettings(BaseSettings):
    """Talk to a model."""

    model_config = _CONFIG | SettingsConfigDict(cli_prog_name="bitwatt chat")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="The model's server")
    model: Annotated[str | None, Shown("NAME", "the server's first")] = Field(
        None, description="The model"
    )
    max_tokens: Annotated[int | None, Shown("TOKENS", "as the context has room for")] = Field(
        None, ge=1, description="Tokens of an answer at most"
    )
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The server's key", repr=False
    )

    check_url = field_validator("url")(_check_url)


def run_compare(settings: CompareSettings) -> int:
    """Measure, print the table, write what was asked for; return the exit status."""
    try:
        prompts = DEFAULT_PROMPTS if settings.prompts is None else read_prompts(settings.prompts)
        comparison = asyncio.run(_compare(settings, prompts))
        print(as_table(comparison))
        if settings.json_path is not None:
            text = json.dumps(as_json(comparison), indent=2)
            settings.json_path.write_text(text + "\n", encoding="utf-8")
        if settings.png is not None:
            save_png(comparison, settings.png)
    except (ClientError, httpx.HTTPError, ValueError, OSError) as error:
        print(f"bitwatt compare: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _compare(settings: CompareSettings, prompts: tuple[str, ...]) -> Comparison:
    def report(name: str, number: int, window: Window) -> None:
        kind = "warm-up" if number < 0 else f"window {number + 1}"
        rate = f"{window.tokens_per_s:.1f} tok/s" if window.answers else "no answer"
        failed = f", {len(window.failures)} failed" if window.failures else ""
        print(f"{name}, {kind}: {rate}{failed}", file=sys.stderr)

    async with new_http_client(max_connections=settings.concurrency) as http:
        a = await _server(http, settings.url_a, settings.model_a, settings.api_key, first=True)
        b = await _server(http, settings.url_b, settings.model_b, settings.api_key, first=False)
        if (a.url, a.model) == (b.url, b.model):
            raise ClientError(f"both are {a.model} of {a.url}; name two (--model-a, --model-b)")
        rent = settings.dollars_per_hour
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
            dollars_per_hour=(rent, settings.dollars_per_hour_b or rent),
        )
        return await compare(a, b, plan, on_window=report)


async def _server(
    http: httpx.AsyncClient, url: str, model: str | None, api_key: str | None, *, first: bool
) -> Server:
    server = Server(http, url, model or "", api_key=api_key)
    if model is None:
        models = await server.list_models()
        if not models:
            raise ClientError(f"{url} serves no models")
        server.model = models[0] if first else models[-1]
    return server


def run_chat(settings: ChatSettings) -> int:
    """Converse until the end of the input; return the exit status."""

    def read() -> str | None:
        with suppress(EOFError):
            return input("> ")
        return None

    async def chat() -> None:
        async with new_http_client() as http:
            server = await _server(http, settings.url, settings.model, settings.api_key, first=True)
            await converse(server, read=read, out=sys.stdout, max_tokens=settings.max_tokens)

    try:
        asyncio.run(chat())
    except (ClientError, httpx.HTTPError) as error:
        print(f"bitwatt chat: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


class TuneSettings(BaseSettings):
    """Time launch configurations of the ternary kernels on this machine's GPU and keep the best."""

    model_config = _CONFIG | SettingsConfigDict(
        env_prefix="BITWATT_TUNE_", cli_prog_name="bitwatt tune"
    )

    shapes: Annotated[tuple[str, ...], Shown("OUTxIN[,OUTxIN...]", "those of 2B4T")] = Field(
        (), description="Sizes of the weights to tune for"
    )
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
