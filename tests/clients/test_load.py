"""The load generator and streams, against a server around a fake engine."""

import asyncio

import pytest
from bitwatt_client import ServerError, StreamError, Work, new_http_client, run_window
from bitwatt_client.server import Server, mean_tpot_s

from tests.fakes import FakeEngine, make_app, make_client, run_server

pytestmark = pytest.mark.anyio


class CountingEngine(FakeEngine):
    """Remembers how many requests were open at once."""

    most_open = 0

    async def submit(self, request):
        async for output in super().submit(request):
            self.most_open = max(self.most_open, len(self.running))
            yield output


def make_work(**changes):
    given = {"prompts": ("one", "two"), "num_requests": 6, "concurrency": 2, "max_tokens": 9}
    return Work(**(given | changes))


def make_server(http, **options):
    return Server(http, "http://localhost/v1/", "tiny", **options)


async def test_a_window_keeps_as_many_requests_open_as_asked_and_no_more():
    engine = CountingEngine(delay_s=0.001)
    async with make_client(make_app(engine)) as http:
        window = await run_window(make_server(http), make_work(num_requests=12, concurrency=3))
    assert len(window.answers) == len(engine.submitted) == 12
    assert engine.most_open == 3
    assert (window.failures, window.num_cut) == ((), 0)


async def test_every_request_asks_for_the_same_work():
    engine = FakeEngine()
    async with make_client(make_app(engine)) as http:
        window = await run_window(make_server(http), make_work(), salt="w1")
    assert [answer.num_tokens for answer in window.answers] == [9] * 6
    assert window.num_tokens == 54
    for submit in engine.submitted:
        assert submit.sampling.temperature == 0
        assert submit.sampling.stop_token_ids == ()
        assert submit.cache_salt == "w1"
    assert sorted(submit.sampling.seed for submit in engine.submitted) == list(range(6))


async def test_an_answers_times_come_from_its_own_stream():
    engine = FakeEngine(delay_s=0.005)
    async with run_server(make_app(engine)) as url, new_http_client() as http:
        server = Server(http, url, "tiny")
        answer = await server.answer([{"role": "user", "content": "hi"}], max_tokens=64)
    assert answer.text == "the quick brown fox"
    assert answer.finish_reason == "stop"
    assert answer.num_prompt_tokens > 0
    assert 0 < answer.ttft_s < answer.e2e_s
    assert sum(answer.itl_s) == pytest.approx(answer.e2e_s - answer.ttft_s)
    assert answer.tpot_s == pytest.approx(sum(answer.itl_s) / (answer.num_tokens - 1))


async def test_an_answer_of_one_token_has_no_time_between_tokens():
    async with make_client(make_app()) as http:
        answer = await make_server(http).answer([{"role": "user", "content": "hi"}], max_tokens=1)
    assert answer.tpot_s is None
    assert answer.itl_s == ()


async def test_tokens_that_are_read_at_once_have_no_time_between_them():
    """A client that was late read an answer at once, and called it 33,000 tokens a second."""
    async with make_client(make_app(FakeEngine(delay_s=0.005))) as http:  # hands over whole bodies
        answer = await make_server(http).answer([{"role": "user", "content": "hi"}], max_tokens=64)
    assert len(answer.text_times_s) > 2
    assert answer.ttft_s == answer.e2e_s
    assert answer.tpot_s is None


async def test_tokens_that_are_read_with_the_first_do_not_count_among_those_after_it():
    # Nine chunks, five of them at once; four later ones in 0.8 s, and each is two tokens.
    assert mean_tpot_s([7.0] * 5 + [7.2, 7.4, 7.6, 7.8], 17) == pytest.approx(0.1)
    assert mean_tpot_s([7.0, 7.2, 7.4], 3) == pytest.approx(0.2)
    assert mean_tpot_s([7.0, 7.0], 2) is None


async def test_failed_requests_are_counted_and_the_rest_goes_on():
    async with make_client(make_app(FakeEngine(refused_seed=2))) as http:
        window = await run_window(make_server(http), make_work())
    assert len(window.answers) == 5
    assert window.failures == ("503: 0 requests wait (--max-queue)",)


async def test_a_window_ends_when_its_time_is_up():
    engine = FakeEngine(gate=asyncio.Event())
    async with run_server(make_app(engine)) as url, new_http_client(max_connections=2) as http:
        window = await run_window(Server(http, url, "tiny"), make_work(max_s=0.3))
    assert window.answers == ()
    assert window.num_cut == 6
    assert engine.running == set()


async def test_an_error_before_and_an_error_within_a_stream_are_told_apart():
    async with make_client(make_app(api_key="k")) as http:
        with pytest.raises(ServerError, match="401: a valid API key is needed"):
            await make_server(http).answer([{"role": "user", "content": "hi"}])
    async with make_client(make_app(FakeEngine(dies_after=2))) as http:
        with pytest.raises(StreamError, match="died"):
            await make_server(http).answer([{"role": "user", "content": "hi"}])


async def test_models_and_metrics_are_read_with_the_key():
    async with make_client(make_app(api_key="k")) as http:
        server = make_server(http, api_key="k")
        assert await server.list_models() == ["tiny"]
        assert (await server.scrape()).total("bitwatt_engine_up", model_name="tiny") == 1


async def test_a_request_that_ended_is_told():
    ended = []
    async with make_client(make_app()) as http:
        await run_window(make_server(http), make_work(), on_end=lambda: ended.append(1))
    assert len(ended) == 6


async def test_an_address_is_named_where_it_can_not_be_reached():
    async with new_http_client(max_connections=2) as http:
        window = await run_window(Server(http, "http://127.0.0.1:1", "m"), make_work())
    assert len(window.failures) == 6
    assert all("http://127.0.0.1:1 can't be reached" in failure for failure in window.failures)
    async with make_client(make_app(api_key="k")) as http:
        with pytest.raises(ServerError, match=r"401: .* \(http://localhost/v1/models\)"):
            await make_server(http).list_models()
