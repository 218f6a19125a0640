"""Public fakes: an engine without a model, a tokenizer trained in a blink, a server around them."""

import asyncio
import math
from array import array
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import httpx
import msgspec
from bitwatt.api.app import create_app
from bitwatt.api.server import new_server
from bitwatt.constraints.checker import GrammarChecker
from bitwatt.constraints.checker_process import Verdict
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.engine.messages import (
    EngineInfo,
    EngineStats,
    MemoryUse,
    PromptLogprobs,
    Submit,
    TokenLogprobs,
    TokenOutput,
)
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError
from bitwatt.scheduling.request import FinishReason
from bitwatt.serving.models import ServedModel
from bitwatt.settings import ServeSettings
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.chat_template import ChatTemplate
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "EOS_TOKEN",
    "FakeEngine",
    "make_app",
    "make_client",
    "make_info",
    "make_model",
    "make_served_app",
    "make_settings",
    "make_text",
    "make_tokenizer",
    "run_server",
    "untimed",
]

EOS_TOKEN = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "héllo wörld, 你好世界 🙂🙃",
    "a b c d e",
] * 3


@cache
def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer of some 300 tokens; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS_TOKEN, "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<added>", special=False)])
    return tokenizer


def make_text(*, template: str | None = CHAT_TEMPLATE) -> TextProcessor:
    """Return a text processor around the small tokenizer."""
    return TextProcessor(copy(_codec(template)))


@cache
def _codec(template: str | None) -> TextCodec:
    chat_template = None if template is None else ChatTemplate(template, {"eos_token": EOS_TOKEN})
    return TextCodec(make_tokenizer(), chat_template)


def make_info(**changes: Any) -> EngineInfo:
    """Return what a small engine would say of itself."""
    given: dict[str, Any] = {
        "weights": "ternary",
        "backend": "fake",
        "device": "cpu",
        "device_name": "fake",
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "num_parameters": 1000,
        "vocab_size": make_tokenizer().get_vocab_size(),
        "max_model_len": 256,
        "eos_token_ids": [0],
        "num_blocks": 64,
        "block_size": 16,
        "max_num_seqs": 8,
        "hidden_size": 4,
        "memory": MemoryUse(
            packed_weights_bytes=100,
            embedding_bytes=200,
            other_weights_bytes=10,
            kv_cache_bytes=1000,
        ),
        "linear_bytes": 100,
        "num_threads": 2,
    }
    return EngineInfo(**(given | changes))


@dataclass(kw_only=True)
class FakeEngine:
    """An engine that says what it was told to say. Meets bitwatt.serving.models.Engine.

    reply         the answer to every request; it ends with EOS where max_tokens leaves room
    replies       or the answer to each request in turn, by its seed modulo their number
    chunk_size    tokens an output
    delay_s       before every output; 0 yields to the event loop
    sleep         waits out the delay, in seconds
    gate          nothing is brought before it is set
    max_open      requests taken at once
    capacity      as many as are said to be
    dies_after    the engine dies after so many outputs of a request
    refused_seed  a request of this seed finds the queue full
    times         seconds queueing, to the first token and after it that it tells; None tells none
    on_stats      gets the engine's figures after every output
    running       ids of open requests
    submitted     every request taken
    """

    reply: str = "the quick brown fox"
    replies: Sequence[str] = ()
    chunk_size: int = 1
    delay_s: float = 0.0
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    gate: asyncio.Event | None = None
    max_open: int = 1000
    capacity: int = 1000
    dies_after: int | None = None
    refused_seed: int | None = None
    ends_with: FinishReason = FinishReason.STOP
    error: str | None = None
    times: tuple[float, float, float] | None = (0.01, 0.02, 0.03)
    on_stats: Callable[[EngineStats], None] | None = None
    info: EngineInfo | None = field(default_factory=make_info)
    is_ready: bool = True
    is_healthy: bool = True
    failure: str | None = None
    running: set[str] = field(default_factory=set)
    submitted: list[Submit] = field(default_factory=list)
    is_started: bool = False

    async def start(self) -> None:
        self.is_started = True

    async def stop(self) -> None:
        self.is_started = False

    async def wait_ready(self) -> EngineInfo:
        if self.info is None:
            raise EngineUnavailableError(self.failure or "the fake engine never loads")
        return self.info

    @contextmanager
    def places(self, requests: Sequence[Submit]) -> Iterator[None]:
        self._require_places(len(requests))
        yield

    def _require_places(self, num_requests: int) -> None:
        if not self.is_ready:
            raise EngineUnavailableError("the fake engine is loading")
        if len(self.running) + num_requests > self.max_open:
            raise QueueFullError(f"{self.max_open} requests wait (--max-queue)")

    async def submit(self, request: Submit) -> AsyncGenerator[TokenOutput, None]:
        self._require_places(1)
        if request.sampling.seed == self.refused_seed:
            raise QueueFullError("0 requests wait (--max-queue)")
        self.submitted.append(request)
        self.running.add(request.request_id)
        try:
            if self.gate is not None:
                await self.gate.wait()
            for num_outputs, output in enumerate(self._outputs(request)):
                if num_outputs == self.dies_after:
                    raise RequestFailedError("the fake engine died")
                await self.sleep(self.delay_s)
                yield output
        finally:
            self.running.discard(request.request_id)

    def _outputs(self, request: Submit) -> list[TokenOutput]:
        sampling = request.sampling
        if sampling.embeds:
            last = self._output(request, [], FinishReason.LENGTH, is_first=True)
            return [msgspec.structs.replace(last, embedding=self._embedding(request))]
        reply = self.replies[sampling.seed % len(self.replies)] if self.replies else self.reply
        token_ids = [*make_tokenizer().encode(reply).ids, 0]
        reason = self.ends_with
        if 0 not in sampling.stop_token_ids:
            token_ids.pop()
            token_ids *= 1 + sampling.max_tokens // len(token_ids)
        if len(token_ids) > sampling.max_tokens:
            token_ids, reason = token_ids[: sampling.max_tokens], FinishReason.LENGTH
        starts = range(0, max(1, len(token_ids)), self.chunk_size)
        first, *others = [
            self._output(
                request,
                token_ids[start : start + self.chunk_size],
                reason if start == starts[-1] else None,
                is_first=start == 0,
            )
            for start in starts
        ]
        return [msgspec.structs.replace(first, prompt_logprobs=self._scores(request)), *others]

    def _embedding(self, request: Submit) -> bytes:
        """Return a vector of length 1 whose first number says how many tokens the prompt has."""
        assert self.info is not None
        first = 1 / (1 + len(request.prompt_token_ids))
        rest = [0.0] * (self.info.hidden_size - 2)
        return array("f", [first, math.sqrt(1 - first**2), *rest]).tobytes()

    def _scores(self, request: Submit) -> PromptLogprobs | None:
        """Return what the API gets of a prompt: at position i -i/4, rank 2, and -1, -2, …."""
        num_scored, k = len(request.prompt_token_ids) - 1, request.sampling.prompt_logprobs
        if k is None or not num_scored:
            return None
        return PromptLogprobs(
            k,
            array("f", [-0.25 * (i + 1) for i in range(num_scored)]).tobytes(),
            array("i", [2] * num_scored).tobytes(),
            array("f", [-1.0 - i for i in range(k)] * num_scored).tobytes(),
            array("i", [*range(k)] * num_scored).tobytes(),
        )

    def _output(
        self,
        request: Submit,
        token_ids: list[int],
        reason: FinishReason | None,
        *,
        is_first: bool,
    ) -> TokenOutput:
        num_top = request.sampling.logprobs
        logprobs = []
        if num_top is not None:
            top = [(token_id, -1.0 - token_id) for token_id in range(num_top)]
            logprobs = [TokenLogprobs(sampled=-0.5, top=top) for _ in token_ids]
        queue_s, prefill_s, decode_s = self.times or (None, None, None)
        return TokenOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            error=self.error,
            num_cached_tokens=2,
            queue_s=queue_s if reason or is_first else None,
            prefill_s=prefill_s if reason or is_first else None,
            decode_s=decode_s if reason else None,
        )


def untimed(usage: dict[str, Any]) -> dict[str, Any]:
    """Return an answer's usage without its times, which are its own; there must be some."""
    assert usage["bitwatt"]["times"]
    took = {name: told for name, told in usage["bitwatt"].items() if name != "times"}
    return {**usage, "bitwatt": took}


def make_settings(**changes: Any) -> ServeSettings:
    """Return settings with these changes, whatever the environment says."""
    return ServeSettings.model_validate({"port": 0, **changes})


class SharingChecker(GrammarChecker):
    """Shares what it found followable with the models of the same tokens in other tests.

    Each would have a process of its own try the same grammars, which takes 0.15 s to start.
    """

    _followable: ClassVar[dict[tuple[bytes, GrammarSource], Verdict]] = {}

    async def _try(self, source: GrammarSource) -> Verdict:
        key = (msgspec.msgpack.encode(self._token_bytes()), source)
        verdict = self._followable.get(key) or await super()._try(source)
        if verdict.grammar is not None:
            self._followable[key] = verdict
        return verdict


def make_model(
    engine: FakeEngine,
    *,
    name: str = "tiny",
    metrics: Metrics | None = None,
    text: TextProcessor | None = None,
    sampling_defaults: Mapping[str, float] | None = None,
) -> ServedModel:
    """Return a served model around the engine, whose metrics were told if it is ready."""
    model = ServedModel(
        name=name,
        engine=engine,
        text=text or make_text(),
        metrics=(metrics or Metrics()).model(name),
        sampling_defaults=sampling_defaults or {},
    )
    checker = SharingChecker(model.text.vocabulary.for_grammars)
    object.__setattr__(model, "grammars", checker)  # as it sets its own
    if engine.is_ready and engine.info is not None:
        model.metrics.on_ready(engine.info)
    return model


def make_app(
    engine: FakeEngine | None = None, *, text: TextProcessor | None = None, **settings: Any
) -> FastAPI:
    """Return the application over one model, `tiny`."""
    metrics = Metrics()
    model = make_model(engine or FakeEngine(), metrics=metrics, text=text)
    return create_app({model.name: model}, make_settings(**settings), metrics)


def make_served_app(engines: Mapping[str, FakeEngine], **settings: Any) -> FastAPI:
    """Return the application over models of these names."""
    metrics = Metrics()
    served = {
        name: make_model(engine, name=name, metrics=metrics) for name, engine in engines.items()
    }
    return create_app(served, make_settings(**settings), metrics)


def make_client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """Return a client that calls the application in this process."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


@asynccontextmanager
async def run_server(app: FastAPI, **settings: Any) -> AsyncIterator[str]:
    """Serve the application on a free port while the block runs; the value is its address."""
    server = new_server(app, make_settings(**settings))
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
            if task.done():
                task.result()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
