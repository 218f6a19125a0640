"""The command bench: any OpenAI-compatible server under load."""

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import httpx
from bitwatt_client import (
    BenchPlan,
    BenchRun,
    ClientError,
    Server,
    Slo,
    bench_as_json,
    bench_as_table,
    new_http_client,
    run_bench,
)
from bitwatt_client.bench import Api, ask
from bitwatt_client.command_line import INTERRUPTED, interruptible, say, wait_while_it_loads
from bitwatt_client.errors import told
from bitwatt_client.lengths import read_lengths
from bitwatt_client.progress import RequestProgress
from bitwatt_client.workload import Asked, PromptWriter, draw_asked, read_asked
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from bitwatt.addresses import checked_url
from bitwatt.knobs import Settings, Shown

__all__ = ["BenchSettings", "run_bench_command"]

_NUM_REQUESTS = 100
_CONCURRENCY = 8


def _checked_lengths(written: str) -> str:
    read_lengths(written)
    return written


_Lengths = Annotated[str, BeforeValidator(_checked_lengths), Shown("LENGTHS")]


class BenchSettings(Settings):
    """Measure an OpenAI-compatible server under load.

    --concurrency holds so many requests open (closed loop); --rate sends so many a second, whether
    or not the server keeps up (open loop), and a request's time counts from when it was due.
    """

    model_config = SettingsConfigDict(env_prefix="BITWATT_CLIENT_", cli_prog_name="bitwatt bench")

    groups: ClassVar[dict[str, str]] = {
        "model": "Model",
        "concurrency": "Load",
        "prompt_tokens": "Requests",
        "slo_ttft": "Promise",
        "json_path": "Output",
    }

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="The model's server")
    model: Annotated[str | None, Shown("NAME", "the server's first")] = Field(
        None, description="The model"
    )
    api: Api = Field("chat", description="Whether /v1/chat/completions or /v1/completions is asked")
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The server's key", repr=False
    )
    concurrency: Annotated[int | None, Shown("REQUESTS", "8, with --rate any number")] = Field(
        None, ge=1, le=65536, description="Requests open at once, at most"
    )
    rate: Annotated[float | None, Shown("RATE", "a request when another ends")] = Field(
        None, gt=0, le=1e6, description="Requests a second, in Poisson arrivals"
    )
    burstiness: Annotated[float, Shown("SHAPE")] = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Shape of the gamma distribution of gaps: 1 is Poisson, less comes in bursts",
    )
    requests: Annotated[int | None, Shown("REQUESTS", "the file's, or else 100")] = Field(
        None, ge=1, le=10_000_000, description="Requests to send"
    )
    warmups: Annotated[int, Shown("REQUESTS")] = Field(
        1, ge=0, le=10_000, description="Requests before them that don't count, one by one"
    )
    max_seconds: Annotated[float, Shown("SECONDS")] = Field(
        3600.0, gt=0, description="Seconds after which what runs is dropped"
    )
    prompt_tokens: _Lengths = Field(
        "256", description="Tokens of prompts: 128, 16-256 (uniform) or lognormal:MEDIAN:P95"
    )
    answer_tokens: _Lengths = Field("64", description="Tokens of answers, written alike")
    prompts: Annotated[Path | None, Shown("FILE", "random words of these lengths")] = Field(
        None,
        description="Your own requests in JSON lines: objects with prompt or messages, and "
        "max_tokens where --answer-tokens is not meant",
    )
    ignore_eos: Annotated[bool | None, Shown("", "on, with --prompts off")] = Field(
        None,
        description="Have answers be as long as asked, by a field that not all servers know",
    )
    temperature: Annotated[float | None, Shown("TEMPERATURE")] = Field(
        0.0, ge=0, le=2, description="Temperature of the answers"
    )
    seed: Annotated[int | None, Shown("SEED", "another each time")] = Field(
        None,
        ge=0,
        lt=2**31,
        description="Seed of lengths, words, arrivals and answers; with one again, a prefix cache "
        "has the prompts already",
    )
    slo_ttft: Annotated[float | None, Shown("SECONDS")] = Field(
        None, gt=0, description="Seconds to the first token that goodput grants"
    )
    slo_tpot: Annotated[float | None, Shown("SECONDS")] = Field(
        None, gt=0, description="Seconds of each token after it that goodput grants"
    )
    slo_e2e: Annotated[float | None, Shown("SECONDS")] = Field(
        None, gt=0, description="Seconds of the whole request that goodput grants"
    )
    usd_per_hour: Annotated[float | None, Shown("USD", "the server's own")] = Field(
        None, gt=0, le=1e6, description="Rent of the server, an hour"
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write the figures to, as JSON; - is the output"
    )
    details: bool = Field(False, description="Add to it what each request took")

    check_url = field_validator("url")(checked_url)

    @model_validator(mode="after")
    def _writes_details(self) -> Self:
        if self.details and self.json_path is None:
            raise ValueError("--details are of --json, which is not given")
        return self

    @property
    def slo(self) -> Slo:
        """What a request is promised."""
        return Slo(ttft_s=self.slo_ttft, tpot_s=self.slo_tpot, e2e_s=self.slo_e2e)


def run_bench_command(settings: BenchSettings) -> int:
    """Measure, print the table, write what was asked for; return the exit status.

    1 where nothing could be measured, or no request was answered
    """
    try:
        own = () if settings.prompts is None else read_asked(settings.prompts)
        if settings.api == "completions" and any(asked.messages is not None for asked in own):
            raise ValueError(f"{settings.prompts} has messages, which --api completions hasn't")
        result = asyncio.run(interruptible(_bench(settings, own)))
        written = json.dumps(result, indent=2) + "\n"
        if settings.json_path == Path("-"):
            sys.stdout.write(written)
        else:
            sys.stdout.write(bench_as_table(result) + "\n")
            if settings.json_path is not None:
                settings.json_path.write_text(written, encoding="utf-8")
    except (ClientError, httpx.HTTPError, ValueError, OSError) as error:
        say(f"bitwatt bench: {told(error)}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return 0 if result["completed"] else 1


async def _bench(settings: BenchSettings, own: tuple[Asked, ...]) -> dict[str, Any]:
    concurrency = settings.concurrency
    if concurrency is None and settings.rate is None:
        concurrency = _CONCURRENCY
    seed = random.randrange(2**31) if settings.seed is None else settings.seed  # noqa: S311
    async with new_http_client(max_connections=concurrency) as http:
        server = Server(
            http, settings.url, settings.model or "", api_key=settings.api_key, asks_energy=True
        )
        await server.choose_model()
        await wait_while_it_loads(server)
        asked = await _asked(settings, own, server, seed)
        plan = BenchPlan(
            asked=asked[settings.warmups :],
            concurrency=concurrency,
            rate=settings.rate,
            burstiness=settings.burstiness,
            api=settings.api,
            temperature=settings.temperature,
            ignore_eos=not own if settings.ignore_eos is None else settings.ignore_eos,
            max_s=settings.max_seconds,
            seed=seed,
        )
        for number, one in enumerate(asked[: settings.warmups], start=1):
            await ask(server, plan, one, 0.0, seed - number)
        run = await _run(server, plan)
        rent = settings.usd_per_hour or await server.usd_per_hour()
    return bench_as_json(
        server.model, plan, run, settings.slo, usd_per_hour=rent, details=settings.details
    )


async def _run(server: Server, plan: BenchPlan) -> BenchRun:
    with RequestProgress(len(plan.asked), sys.stderr) as progress:
        return await run_bench(server, plan, on_end=progress.add)


async def _asked(
    settings: BenchSettings, own: tuple[Asked, ...], server: Server, seed: int
) -> list[Asked]:
    """Return the requests, those of the warm-up first."""
    answers = read_lengths(settings.answer_tokens)
    if own:
        num_own = settings.requests or len(own)
        chance = random.Random(seed)  # noqa: S311 - a workload, no secret
        chosen = [*own[:1] * settings.warmups, *(own[i % len(own)] for i in range(num_own))]
        return [
            Asked(one.prompt, one.messages, one.max_tokens or answers.draw(chance))
            for one in chosen
        ]
    probe = BenchPlan(asked=(), api=settings.api, max_tokens=1)

    async def count(text: str) -> int:
        return (await ask(server, probe, Asked(text), 0.0, seed)).num_prompt_tokens

    writer = await PromptWriter.learn(count)
    num_requests = settings.warmups + (settings.requests or _NUM_REQUESTS)
    prompts = read_lengths(settings.prompt_tokens)
    return draw_asked(writer, prompts, answers, num_requests, seed)
