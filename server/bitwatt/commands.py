"""The commands beside `bitwatt serve`: compare, chat and tune."""

import asyncio
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

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
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

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

    url_a: CliPositionalArg[str] = Field(description="server of the first model")
    url_b: CliPositionalArg[str] = Field(description="server of the model it is compared with")
    model_a: str | None = Field(None, description="the first model, in place of the server's first")
    model_b: str | None = Field(None, description="the second model, in place of the server's last")
    concurrency: int = Field(8, ge=1, le=4096, description="requests at once")
    requests: int = Field(32, ge=1, le=1_000_000, description="requests of a window")
    windows: int = Field(6, ge=1, le=10_000, description="windows of each model that count")
    warmups: int = Field(1, ge=0, le=100, description="windows of each model dropped before them")
    max_tokens: int = Field(64, ge=2, description="tokens of every answer")
    max_window_seconds: float = Field(600.0, gt=0, description="when a window is given up")
    prompts: Path | None = Field(None, description="one prompt a line, or .jsonl with prompt")
    dollars_per_hour: float | None = Field(None, gt=0, description="rent of the first server")
    dollars_per_hour_b: float | None = Field(
        None, gt=0, description="rent of the second server, where it isn't the first's"
    )
    api_key: str | None = Field(None, description="the servers' key", repr=False)
    json_path: Path | None = Field(None, alias="json", description="where to write JSON")
    png: Path | None = Field(None, description="where to write a picture")

    check_urls = field_validator("url_a", "url_b")(_check_url)


class ChatSettings(BaseSettings):
    """Talk to a model."""

    model_config = _CONFIG | SettingsConfigDict(cli_prog_name="bitwatt chat")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="the model's server")
    model: str | None = Field(None, description="the model, in place of the server's first")
    max_tokens: int | None = Field(None, ge=1, description="tokens of an answer at most")
    api_key: str | None = Field(None, description="the server's key", repr=False)

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

    shapes: tuple[str, ...] = Field(
        (), description="weights as OUTxIN, with commas; in place of those of 2B4T"
    )
    output: Path | None = Field(None, description="file to write, in place of the package's own")
    jobs: int | None = Field(None, ge=1, le=1024, description="processes that compile")

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
