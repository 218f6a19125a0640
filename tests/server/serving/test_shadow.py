"""Shadow traffic: mirrors are compared, counted, and never felt by the original."""

import asyncio
import json
import time

import pytest
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineStats
from bitwatt.serving.shadow import agreement
from bitwatt.settings import ServeSettings
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.codec import TextCodec
from bitwatt.text.processor import TextProcessor
from bitwatt_client import Server, Work, new_http_client, run_window
from bitwatt_client.exposition import parse_samples
from tokenizers import Tokenizer

from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_info,
    make_model,
    make_settings,
    make_tokenizer,
    run_server,
)

pytestmark = pytest.mark.anyio

ASKED = {"X-Bitwatt-Shadow": "1"}
ELSEWHERE = make_info(device="cuda:0")
BODY = {"model": "tiny", "prompt": "fox", "max_tokens": 64, "temperature": 0}


class Pair:
    """A server of two models around fake engines, on one device unless their info differs."""

    def __init__(self, *, original=None, twin=None, twin_text=None, defaults=None, **settings):
        self.original = original or FakeEngine(reply="the quick brown fox")
        self.twin = twin or FakeEngine(reply="the quick brown cat")
        self.metrics = Metrics()
        engines = {"tiny": self.original, "tiny-fp16": self.twin}
        self.models = {
            name: make_model(
                engine,
                name=name,
                metrics=self.metrics,
                text=None if name == "tiny" else twin_text,
                sampling_defaults=(defaults or {}).get(name),
            )
            for name, engine in engines.items()
        }
        self.app = create_app(self.models, make_settings(**settings), self.metrics)

    def counted(self, name, **labels):
        body, _ = self.metrics.render()
        return parse_samples(body.decode()).total(name, **labels)

    def outcomes(self, outcome):
        return self.counted("bitwatt_shadow_requests_total", outcome=outcome) or 0

    async def settle(self, outcome, num=1):
        """Wait until so many mirrors came out so."""
        await until(lambda: self.outcomes(outcome) >= num)

    async def twin_runs(self, num):
        """Wait until the twin runs so many mirrors."""
        await until(lambda: len(self.twin.running) == num)


async def until(is_so):
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def ask(url, path="/v1/completions", headers=ASKED, **changes):
    async with new_http_client() as client:
        return await client.post(url + path, json=BODY | changes, headers=headers)


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("", "", 1),
        ("same", "same", 1),
        ("abcd", "abxx", 0.5),
        ("abcd", "ab", 0.5),
        ("ab", "abcdefgh", 0.25),
        ("x", "", 0),
        ("x", "y", 0),
    ],
)
def test_agreement_is_the_share_before_two_texts_part(one, other, share):
    assert agreement(one, other) == share


async def test_a_mirrored_pair_is_compared():
    pair = Pair()
    async with run_server(pair.app) as url:
        answer = (await ask(url)).json()
        await pair.settle("compared")
    assert answer["choices"][0]["text"] == "the quick brown fox"
    names = {"model_name": "tiny", "mirror_name": "tiny-fp16"}
    for side in ("original", "mirror"):
        assert pair.counted("bitwatt_shadow_latency_seconds_count", side=side, **names) == 1
        assert pair.counted("bitwatt_shadow_time_to_first_token_seconds_count", side=side) == 1
    tokens = pair.counted("bitwatt_shadow_tokens_total", side="original", kind="generation")
    assert tokens == answer["usage"]["completion_tokens"]
    # "the quick brown " is 16 of 19 characters.
    assert pair.counted("bitwatt_shadow_text_agreement_sum") == pytest.approx(16 / 19)
    assert pair.counted("bitwatt_shadow_energy_joules_total") is None


def other_text():
    """Return the text of a model with another vocabulary."""
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    tokenizer.add_tokens(["<other>"])
    return TextProcessor(TextCodec(tokenizer))


async def test_a_twin_of_another_vocabulary_is_asked_by_texts_alone():
    pair = Pair(twin_text=other_text(), shadow_percent=100)
    async with run_server(pair.app) as url:
        await ask(url, headers={})
        await pair.settle("compared")
        for said in ({"prompt": [5, 6]}, {"stop_token_ids": [5]}, {"logit_bias": {"5": 1}}):
            answer = await ask(url, headers={}, **said)
            assert answer.status_code == 200
            answer = await ask(url, **said)
            assert answer.status_code == 400
            assert "can't ask tiny-fp16 by token ids" in answer.json()["error"]["message"]
    assert pair.outcomes("dropped") == 3
    assert pair.outcomes("compared") == 1


async def test_token_ids_are_asked_of_a_twin_of_the_same_vocabulary():
    pair = Pair()
    async with run_server(pair.app) as url:
        await ask(url, prompt=[5, 6], stop_token_ids=[7])
        await pair.settle("compared")


async def test_a_mirror_is_drawn_by_the_defaults_of_the_model_that_was_called():
    defaults = {"tiny": {"temperature": 0.5}, "tiny-fp16": {"temperature": 0.9, "top_k": 3}}
    pair = Pair(defaults=defaults)
    async with run_server(pair.app) as url:
        await ask(url, temperature=None)
        await pair.settle("compared")
    [original], [mirror] = pair.original.submitted, pair.twin.submitted
    assert original.sampling.temperature == mirror.sampling.temperature == 0.5
    assert mirror.sampling.top_k == 0


async def test_the_mirror_asks_the_same_in_the_least_priority():
    pair = Pair()
    async with run_server(pair.app) as url:
        await ask(url, temperature=0.7, n=2)
        await pair.settle("compared")
    assert [s.sampling for s in pair.twin.submitted] == [
        s.sampling for s in pair.original.submitted
    ]
    for mirror, original in zip(pair.twin.submitted, pair.original.submitted, strict=True):
        assert mirror.prompt_token_ids == original.prompt_token_ids
        assert mirror.sampling == original.sampling
        assert mirror.request_id.startswith("shadow-")
        assert mirror.priority == 2**31 - 1
    # Sampled texts differ by chance: their agreement says nothing.
    assert not pair.counted("bitwatt_shadow_text_agreement_count")


async def test_prompts_that_are_only_scored_have_no_texts_that_could_agree():
    pair = Pair()
    async with run_server(pair.app) as url:
        await ask(url, max_tokens=0, echo=True, logprobs=1)
        await pair.settle("compared")
    assert not pair.counted("bitwatt_shadow_text_agreement_count")


async def test_a_mirror_is_no_request_of_a_callers():
    pair = Pair()
    async with run_server(pair.app) as url:
        await ask(url)
        await pair.settle("compared")
    counted = "vllm:e2e_request_latency_seconds_count"
    assert pair.counted(counted, model_name="tiny") == 1
    assert not pair.counted(counted, model_name="tiny-fp16")
    assert not pair.counted("vllm:request_success_total", model_name="tiny-fp16")


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_is_mirrored_streamed_or_whole(stream):
    pair = Pair()
    async with run_server(pair.app) as url, new_http_client() as client:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "fox?"}],
            "temperature": 0,
            "stream": stream,
        }
        answer = await client.post(url + "/v1/chat/completions", json=body, headers=ASKED)
        await pair.settle("compared")
    assert answer.status_code == 200
    if stream:
        assert answer.text.endswith("data: [DONE]\n\n")
        assert json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["model"] == "tiny"
    [mirror], [original] = pair.twin.submitted, pair.original.submitted
    assert mirror.prompt_token_ids == original.prompt_token_ids


@pytest.mark.parametrize(
    "twin",
    [
        FakeEngine(dies_after=1),
        FakeEngine(max_open=0),
        FakeEngine(is_ready=False, is_healthy=False),
        FakeEngine(info=None),
    ],
    ids=["dies", "is-full", "is-down", "loads"],
)
async def test_a_mirror_that_fails_is_counted_and_not_felt(twin):
    pair = Pair(twin=twin)
    async with run_server(pair.app) as url:
        answer = await ask(url)
        await pair.settle("failed")
        assert (await ask(url, headers={})).status_code == 200
    assert answer.status_code == 200
    assert not pair.counted("bitwatt_shadow_text_agreement_count")


async def test_a_mirror_that_hangs_holds_up_nobody_and_further_ones_are_dropped():
    pair = Pair(twin=FakeEngine(gate=asyncio.Event(), info=ELSEWHERE))
    async with run_server(pair.app) as url:
        answers = [await ask(url)]
        await pair.twin_runs(1)
        answers += await asyncio.gather(*(ask(url) for _ in range(22)))
        assert {answer.status_code for answer in answers} == {200}
        # One hangs, sixteen wait.
        await pair.settle("dropped", 6)
        assert len(pair.twin.running) == 1
        assert pair.counted("bitwatt_shadow_waiting") == 16
    assert pair.outcomes("dropped") == 6
    assert pair.outcomes("abandoned") == 17  # when the server stopped
    assert pair.counted("bitwatt_shadow_waiting") == 0
    assert pair.twin.running == set()


@pytest.mark.parametrize("called", ["tiny", "tiny-fp16"])
async def test_a_mirror_waits_while_a_model_on_its_device_has_callers(called):
    pair = Pair()
    async with run_server(pair.app) as url:
        pair.models[called].callers.arrive()
        await ask(url)
        assert pair.counted("bitwatt_shadow_waiting", model_name="tiny") == 1
        await asyncio.sleep(0.4)  # for longer than the device has to be quiet
        assert pair.twin.submitted == []
        pair.models[called].callers.leave()
        await pair.settle("compared")
    assert pair.counted("bitwatt_shadow_waiting") == 0


@pytest.mark.parametrize("called", ["tiny", "tiny-fp16"])
async def test_a_mirror_is_given_up_when_a_caller_comes_to_its_device(called):
    """A mirror once kept its row, and its share of the processor, beside callers."""
    pair = Pair(twin=FakeEngine(gate=asyncio.Event()))
    async with run_server(pair.app) as url:
        await ask(url)
        await pair.twin_runs(1)
        [mirror] = pair.twin.running
        caller = asyncio.create_task(ask(url, headers={}, model=called))
        await pair.settle("preempted")
        assert mirror not in pair.twin.running
        pair.twin.gate.set()
        assert (await caller).status_code == 200
    assert pair.outcomes("compared") == 0


async def test_models_on_devices_of_their_own_do_not_wait_for_each_other():
    pair = Pair(twin=FakeEngine(gate=asyncio.Event(), info=ELSEWHERE))
    async with run_server(pair.app) as url:
        await ask(url)
        pair.models["tiny"].callers.arrive()
        await pair.twin_runs(1)
        assert (await ask(url, headers={})).status_code == 200
        pair.twin.gate.set()
        await pair.settle("compared")
        await ask(url)
        await pair.settle("compared", 2)
    assert pair.outcomes("preempted") == 0


async def test_of_mirrors_that_wait_the_oldest_is_dropped():
    pair = Pair()
    async with run_server(pair.app) as url:
        pair.models["tiny"].callers.arrive()
        for number in range(18):
            await ask(url, seed=number)
        assert pair.outcomes("dropped") == 2
        pair.models["tiny"].callers.leave()
        await pair.settle("compared", 16)
    assert [submit.sampling.seed for submit in pair.twin.submitted] == list(range(2, 18))


async def test_what_a_mirrors_last_step_cost_is_made_up_for_before_the_next():
    pair = Pair(twin=FakeEngine(gate=asyncio.Event()))
    metrics = pair.models["tiny-fp16"].metrics
    async with run_server(pair.app) as url:
        await ask(url)
        await pair.twin_runs(1)
        await ask(url)
        await pair.settle("preempted")
        given_up_s = time.monotonic()
        pair.twin.gate.set()
        # The engine tells of a step in which the mirror still ran, then that it runs no more.
        await asyncio.sleep(0.01)
        metrics.on_stats(EngineStats(num_running=1, time_s=time.monotonic()))
        await asyncio.sleep(0.01)
        ended_s = time.monotonic()
        metrics.on_stats(EngineStats(time_s=ended_s))
        await pair.settle("compared")
        assert time.monotonic() - ended_s >= 19 * (ended_s - given_up_s)
    assert len(pair.twin.submitted) == 2


async def test_a_request_of_many_choices_is_not_mirrored():
    pair = Pair()
    async with run_server(pair.app) as url:
        assert (await ask(url, n=9)).status_code == 200
        await pair.settle("dropped")
        await ask(url, n=8)
        await pair.settle("compared")
    assert len(pair.twin.submitted) == 8


async def test_a_mirror_that_takes_too_long_is_given_up():
    pair = Pair(twin=FakeEngine(gate=asyncio.Event()), request_timeout=0.3)
    async with run_server(pair.app) as url:
        assert (await ask(url)).status_code == 200
        await pair.settle("failed")
        assert pair.twin.running == set()


async def test_an_answer_that_was_not_completed_is_not_mirrored():
    pair = Pair(original=FakeEngine(dies_after=1))
    async with run_server(pair.app) as url:
        assert (await ask(url)).status_code == 500
        await pair.settle("abandoned")
    assert pair.twin.submitted == []


async def test_the_setting_mirrors_what_does_not_say_otherwise():
    pair = Pair(shadow_percent=100)
    async with run_server(pair.app) as url:
        await ask(url, headers={})
        await ask(url, headers={"X-Bitwatt-Shadow": "0"})
        await ask(url, headers={}, model="tiny-fp16")
        await pair.settle("compared", 2)
    assert pair.counted("bitwatt_shadow_requests_total", model_name="tiny") == 1
    assert pair.counted("bitwatt_shadow_requests_total", model_name="tiny-fp16") == 1


async def test_what_a_client_measures_is_never_mirrored():
    pair = Pair(shadow_percent=100)
    work = Work(prompts=("fox",), num_requests=3, concurrency=1, max_tokens=4)
    async with run_server(pair.app) as url, new_http_client() as http:
        window = await run_window(Server(http, url, "tiny"), work)
    assert len(window.answers) == 3
    assert pair.twin.submitted == []


async def test_nothing_is_mirrored_unasked():
    pair = Pair()
    async with run_server(pair.app) as url:
        await ask(url, headers={})
    assert pair.twin.submitted == []
    assert pair.counted("bitwatt_shadow_requests_total") is None


@pytest.mark.parametrize(
    ("app", "word", "said"),
    [
        (make_app, "1", "needs two models, 1 served here"),
        (lambda: Pair().app, "yes", "is 0 or 1, not 'yes'"),
    ],
    ids=["one-model", "another-word"],
)
async def test_a_mirror_that_can_not_be_is_refused(app, word, said):
    async with make_client(app()) as client:
        answer = await client.post("/v1/completions", json=BODY, headers={"X-Bitwatt-Shadow": word})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["param"] == "X-Bitwatt-Shadow"


def test_the_setting_needs_a_pair(tmp_path):
    (tmp_path / "config.json").touch()
    assert ServeSettings(shadow_percent=5).shadow_percent == 5
    for settings in ({"compare": False}, {"path": tmp_path}):
        with pytest.raises(ValueError, match="--shadow-percent mirrors to a second model"):
            ServeSettings(shadow_percent=5, **settings)
