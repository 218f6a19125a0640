"""The handle on a real engine process, running the fake model."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from bitwatt.engine.client import EngineClient
from bitwatt.engine.messages import EngineConfig, EngineStats, Submit, TokenOutput
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError
from bitwatt.model.fake_runner import fake_token
from bitwatt.scheduling.request import FinishReason, ResolvedSampling

pytestmark = pytest.mark.slow

VOCAB_SIZE = 97


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return tmp_path


class Engine:
    """A started client and the stats it reported."""

    def __init__(
        self,
        model_path: Path,
        max_queue: int = 256,
        step_timeout_s: float = 60.0,
        load_timeout_s: float = 60.0,
        **config: object,
    ) -> None:
        self.stats: list[EngineStats] = []
        self.events: list[str] = []
        self.client = EngineClient(
            EngineConfig(model_path=str(model_path), backend="fake", **config),  # type: ignore[arg-type]
            max_queue=max_queue,
            step_timeout_s=step_timeout_s,
            load_timeout_s=load_timeout_s,
            on_ready=lambda info: self.events.append(f"ready: {info.backend}"),
            on_step=lambda message: self.stats.append(message.stats),
            on_down=lambda: self.events.append("down"),
            on_restart=lambda: self.events.append("restart"),
        )

    async def when_idle(self) -> EngineStats:
        """Return stats that were reported after now and say that nothing runs."""
        self.stats.clear()
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0.02)
                for stats in self.stats:
                    if stats.num_running == stats.num_waiting == 0:
                        return stats


@asynccontextmanager
async def started(model_path: Path, **settings: object) -> AsyncIterator[Engine]:
    engine = Engine(model_path, **settings)  # type: ignore[arg-type]
    await engine.client.start()
    try:
        async with asyncio.timeout(60):
            await engine.client.wait_ready()
        yield engine
    finally:
        await engine.client.stop()


def make_submit(name: str, prompt: list[int], max_tokens: int = 5) -> Submit:
    sampling = ResolvedSampling(max_tokens=max_tokens)
    return Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling)


async def collect(engine: Engine, request: Submit) -> list[TokenOutput]:
    return [output async for output in engine.client.submit(request)]


def test_concurrent_requests_get_their_own_tokens(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path) as engine:
            prompts = [[i, i + 1, i + 2] for i in range(20)]
            all_outputs = await asyncio.gather(
                *(collect(engine, make_submit(str(p), p, 9)) for p in prompts)
            )
            for prompt, outputs in zip(prompts, all_outputs, strict=True):
                tokens = [token for output in outputs for token in output.token_ids]
                assert tokens == [fake_token(prompt, 0, 3 + i, VOCAB_SIZE) for i in range(9)]
                assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]

    asyncio.run(scenario())


def test_closing_a_stream_aborts_its_request(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path) as engine:
            for i in range(20):
                async with aclosing(
                    engine.client.submit(make_submit(str(i), [1], 4000))
                ) as outputs:
                    await anext(outputs)
            stats = await engine.when_idle()
            assert stats.num_blocks_used == 0

    asyncio.run(scenario())


def test_killed_engine_fails_open_requests_and_serves_again(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path) as engine:
            client = engine.client
            outputs = client.submit(make_submit("x", [1], 4000))
            await anext(outputs)
            assert client.process_id is not None
            os.kill(client.process_id, signal.SIGKILL)
            with pytest.raises(RequestFailedError, match="status -9"):
                async for _ in outputs:
                    pass
            assert not client.is_ready
            assert not client.is_healthy
            assert engine.events == ["ready: fake", "down"]
            with pytest.raises(EngineUnavailableError):
                await anext(client.submit(make_submit("y", [1])))
            async with asyncio.timeout(30):
                await client.wait_ready()
            assert (await collect(engine, make_submit("z", [1])))[-1].finish_reason == "length"
        assert engine.events == ["ready: fake", "down", "restart", "ready: fake", "down"]

    asyncio.run(scenario())


def test_hung_engine_is_replaced_and_its_requests_fail_with_the_limit(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path, step_timeout_s=2.0) as engine:
            client = engine.client
            outputs = client.submit(make_submit("x", [1], 4000))
            await anext(outputs)
            hung = client.process_id
            assert hung is not None
            os.kill(hung, signal.SIGSTOP)
            with pytest.raises(RequestFailedError, match=r"no step for .*--step-timeout"):
                async for _ in outputs:
                    pass
            assert not client.is_healthy
            async with asyncio.timeout(30):
                await client.wait_ready()
            assert client.process_id != hung
            assert (await collect(engine, make_submit("y", [1])))[-1].finish_reason == "length"

    asyncio.run(scenario())


def test_request_past_the_queue_is_refused_and_the_others_go_on(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path, max_num_seqs=1, max_queue=1) as engine:
            streams = [engine.client.submit(make_submit(name, [1], 2000)) for name in "ab"]
            firsts = [asyncio.create_task(anext(stream)) for stream in streams]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match=r"1 requests run and 1 wait.*--max-queue"):
                await anext(engine.client.submit(make_submit("c", [1])))
            for stream, first in zip(streams, firsts, strict=True):
                assert (await first).token_ids
                await stream.aclose()

    asyncio.run(scenario())


def test_places_are_kept_for_all_requests_or_for_none(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path, max_num_seqs=1, max_queue=3) as engine:
            client = engine.client
            two, others = ([make_submit(name, [1]) for name in names] for names in ("ab", "cde"))
            with client.places(two):
                with pytest.raises(QueueFullError, match=r"2 of 3 places are free: 1 requests run"):
                    client.places(others).__enter__()
                with client.places(others[:2]), pytest.raises(QueueFullError):
                    await anext(client.submit(others[2]))
                await asyncio.gather(*(collect(engine, request) for request in two))
            with client.places(others):
                pass
            with client.places([*two, *others[:2]]):
                pass

    asyncio.run(scenario())


def test_engine_that_cannot_start_says_why(model_path: Path) -> None:
    async def scenario() -> None:
        engine = Engine(model_path, max_num_batched_tokens=1, max_num_seqs=2)
        await engine.client.start()
        async with asyncio.timeout(60):
            with pytest.raises(EngineUnavailableError, match="--max-num-batched-tokens"):
                await engine.client.wait_ready()
        assert not engine.client.is_healthy
        assert engine.client.info is None
        await engine.client.stop()

    asyncio.run(scenario())


def test_request_too_long_for_the_engine_ends_with_an_error(model_path: Path) -> None:
    async def scenario() -> None:
        async with started(model_path, max_model_len=64) as engine:
            [output] = await collect(engine, make_submit("x", [1] * 65))
            assert output.finish_reason is FinishReason.ERROR
            assert "65 tokens" in (output.error or "")

    asyncio.run(scenario())


def test_engine_process_ends_with_its_parent(model_path: Path) -> None:
    async def scenario() -> int:
        async with started(model_path) as engine:
            assert engine.client.process_id is not None
            return engine.client.process_id

    process_id = asyncio.run(scenario())
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)
