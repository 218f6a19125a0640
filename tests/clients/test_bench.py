"""A benchmark of any server: how requests are sent, and the figures worked out by hand."""

import asyncio
import json
import random
import sys
from itertools import pairwise

import httpx
import pytest
from bitwatt_client.bench import BenchPlan, BenchRun, Failure, Slo, arrivals, run_bench
from bitwatt_client.bench_report import bench_as_json, bench_as_table
from bitwatt_client.command_line import INTERRUPTED
from bitwatt_client.errors import ClientError, ServerError
from bitwatt_client.events import read_comment, read_event
from bitwatt_client.lengths import read_lengths
from bitwatt_client.progress import RequestProgress
from bitwatt_client.server import Server, new_http_client, whole_answer
from bitwatt_client.workload import Asked, PromptWriter, draw_asked, read_asked

from tests.clients.test_compare import make_answer
from tests.clients.test_load import CountingEngine
from tests.clients.test_progress import Terminal
from tests.command_line import run_command
from tests.fakes import FakeEngine, make_app, make_client, run_server

pytestmark = pytest.mark.anyio

ASKED = (Asked("one", max_tokens=9), Asked("two", max_tokens=9))


def make_plan(num_requests=6, **changes):
    asked = [ASKED[i % 2] for i in range(num_requests)]
    return BenchPlan(**({"asked": asked, "ignore_eos": True} | changes))


def make_server(http, **options):
    return Server(http, "http://localhost", "tiny", **options)


async def bench_with(engine, plan, **options):
    async with make_client(make_app(engine)) as http:
        return await run_bench(make_server(http), plan, **options)


async def test_a_closed_loop_holds_as_many_requests_open_as_asked():
    engine = CountingEngine(delay_s=0.001)
    ended = []
    run = await bench_with(engine, make_plan(12, concurrency=3), on_end=lambda: ended.append(1))
    assert len(run.answers) == len(engine.submitted) == len(ended) == 12
    assert engine.most_open == run.most_open == 3
    assert [answer.num_tokens for answer in run.answers] == [9] * 12


async def test_an_open_loop_sends_every_request_when_it_is_due_however_slow_the_server_is():
    """A loop that waits for answers asks a slow server less, and hides how slow it is."""
    engine = CountingEngine(gate=asyncio.Event())  # answers nobody
    task = asyncio.create_task(bench_with(engine, make_plan(20, rate=2000.0)))
    while len(engine.running) < 20:  # noqa: ASYNC110 - the fake has no events to wait for
        await asyncio.sleep(0.001)
    engine.gate.set()
    run = await task
    assert run.most_open == 20
    assert len(run.answers) == 20


async def test_what_waits_for_a_place_in_an_open_loop_counts_from_when_it_was_due():
    gate = asyncio.Event()
    engine = CountingEngine(gate=gate)
    plan = make_plan(4, rate=1e6, concurrency=1)
    task = asyncio.create_task(bench_with(engine, plan))
    while not engine.running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)  # the other three are due, and have no place
    gate.set()
    run = await task
    assert (engine.most_open, run.most_open) == (1, 1)
    assert all(answer.ttft_s >= 0.05 for answer in run.answers)


async def test_arrivals_are_poisson_at_the_rate_unless_they_are_asked_to_be_burstier():
    asked = [ASKED[0]] * 20_000

    def gaps(burstiness):
        due_s = [*arrivals(BenchPlan(asked=asked, rate=50.0, burstiness=burstiness, seed=7))]
        assert due_s[0] == 0.0
        return [after - before for before, after in pairwise(due_s)]

    for burstiness in (1.0, 0.25):
        found = gaps(burstiness)
        mean = sum(found) / len(found)
        variance = sum((gap - mean) ** 2 for gap in found) / len(found)
        # Of 20,000 gaps the mean is within 4 standard errors; the seed makes it certain.
        assert mean == pytest.approx(1 / 50, rel=4 / (20_000 * burstiness) ** 0.5)
        assert variance == pytest.approx(mean**2 / burstiness, rel=0.15)


async def test_failures_are_counted_by_kind_and_the_rest_goes_on():
    plan = make_plan(concurrency=2)
    run = await bench_with(FakeEngine(refused_seed=2), plan)
    assert isinstance(run.outcomes[2], Failure)
    result = bench_as_json("tiny", plan, run, Slo(), details=True)
    assert (result["completed"], result["failed"], result["cut"]) == (5, 1, 0)
    example = "503: 0 requests wait (--max-queue)"
    assert result["errors_by_kind"] == {"HTTP 503": {"count": 1, "example": example}}
    assert result["errors"] == ["", "", example, "", "", ""]
    assert result["output_lens"] == [9, 9, 0, 9, 9, 9]
    assert f"1 request failed, HTTP 503: {example}" in bench_as_table(result)


async def test_a_server_that_is_not_there_and_a_stream_that_breaks_off_are_kinds_too():
    plan = make_plan(2)
    async with new_http_client(max_connections=None) as http:
        run = await run_bench(Server(http, "http://127.0.0.1:1", "m"), plan)
    assert [failure.kind for failure in run.failures] == ["ConnectError"] * 2
    run = await bench_with(FakeEngine(dies_after=2), plan)
    assert [failure.kind for failure in run.failures] == ["StreamError"] * 2


async def test_a_benchmark_ends_when_its_time_is_up():
    engine = FakeEngine(gate=asyncio.Event())
    plan = make_plan(concurrency=2, max_s=0.05)
    async with run_server(make_app(engine)) as url, new_http_client(max_connections=2) as http:
        run = await run_bench(Server(http, url, "tiny"), plan)
        engine.gate.set()
    assert (run.num_cut, run.answers) == (6, [])
    result = bench_as_json("tiny", plan, run, Slo(ttft_s=1.0))
    assert (result["request_goodput"], result["mean_ttft_ms"]) == (0.0, None)
    assert "cut off by the time limit" in bench_as_table(result)


async def test_completions_are_asked_as_such():
    engine = FakeEngine()
    run = await bench_with(engine, make_plan(2, api="completions"))
    assert [answer.num_tokens for answer in run.answers] == [9, 9]
    assert all(answer.text for answer in run.answers)
    assert len(engine.submitted[0].prompt_token_ids) == run.outcomes[0].num_prompt_tokens


def make_run():
    """Answers of 0.1, 0.2 and 0.3 s to the first of 11 tokens, and 1 s for the other ten."""
    answers = [make_answer(ttft_s=ttft_s, decode_s=1.0) for ttft_s in (0.1, 0.2, 0.3)]
    return BenchRun(outcomes=[*answers, Failure("HTTP 503", "full")], wall_s=2.0, most_open=2)


async def test_the_figures_are_what_they_are_by_hand():
    plan = make_plan(4, concurrency=2)
    slo = Slo(ttft_s=0.25, tpot_s=0.15)
    result = bench_as_json("m", plan, make_run(), slo, usd_per_hour=1.98)
    assert (result["completed"], result["num_prompts"]) == (3, 4)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (9, 33)
    assert result["request_throughput"] == 1.5
    assert result["output_throughput"] == 16.5
    assert result["total_token_throughput"] == 21.0
    assert result["median_ttft_ms"] == pytest.approx(200)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(100 * (2 / 3) ** 0.5)
    assert result["p90_ttft_ms"] == pytest.approx(280)
    assert result["median_tpot_ms"] == pytest.approx(100)
    assert result["median_itl_ms"] == pytest.approx(1000)
    assert result["p99_e2el_ms"] == pytest.approx(1298)
    # Two of the four met both limits; the one that failed met none.
    assert (result["request_goodput"], result["goodput_share"]) == (1.0, 0.5)
    assert result["goodput_slo_ms"] == {"ttft": 250.0, "tpot": 150.0}
    assert result["usd_per_million_output_tokens"] == pytest.approx(1.98 / (16.5 * 3600) * 1e6)
    shown = bench_as_table(result)
    assert (
        "goodput                               1/s, 50.0% with ttft ≤ 250 ms, tpot ≤ 150 ms"
        in shown
    )
    assert "the server told joules of 0 of 3 answers" in shown


async def test_without_a_promise_there_is_no_goodput():
    result = bench_as_json("m", make_plan(4), make_run(), Slo())
    assert result["request_goodput"] is None
    assert "goodput" not in bench_as_table(result)


async def test_a_promise_of_the_whole_request_counts_too():
    slo = Slo(e2e_s=1.15)
    assert [slo.is_met(answer) for answer in make_run().answers] == [True, False, False]


async def test_joules_and_dollars_are_summed_where_every_answer_tells_them():
    def stream(*told):
        async def events():
            yield read_event(
                '{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}', 1.0
            )
            yield read_event(
                '{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}', 1.0
            )
            for line in told:
                if (chunk := read_comment(line, 1.0)) is not None:
                    yield chunk

        return whole_answer(events(), 0.5)

    priced = await stream(
        ": keep-alive", ': energy {"energy_joules": 2.0}', ': cost {"request_cost_usd": 0.25}'
    )
    unmeasured = await stream(': energy {"energy_joules": null, "reason": "no counter"}')

    def figures(*answers):
        run = BenchRun(outcomes=[*answers], wall_s=1.0)
        return bench_as_json("m", make_plan(2), run, Slo())

    both = figures(priced, priced)
    assert (both["total_energy_joules"], both["joules_per_output_token"]) == (4.0, 0.5)
    assert (both["total_cost_usd"], both["energy_unavailable"]) == (0.5, None)
    mixed = figures(priced, unmeasured)
    assert (mixed["total_energy_joules"], mixed["total_cost_usd"]) == (None, None)
    assert mixed["energy_unavailable"] == "no counter"


async def test_thinking_is_output_and_comments_that_make_no_sense_are_none():
    for name in ("reasoning_content", "reasoning"):
        chunk = read_event(json.dumps({"choices": [{"delta": {name: "hm"}}]}), 1.0)
        assert (chunk.text, chunk.reasoning, chunk.is_output) == ("", "hm", True)
    for line in (": energy no", ": energy [1]", ": ping", ":", ""):
        assert read_comment(line, 1.0) is None


def counter(tokens_a_word=1.5, num_added=20, max_tokens=10_000):
    """Return what counts as a server does whose template adds some tokens."""

    async def count(text):
        num_tokens = round(len(text.split()) * tokens_a_word + num_added)
        if num_tokens > max_tokens:
            raise ServerError(400, "the prompt has too many tokens")
        return num_tokens

    return count


async def test_prompts_are_written_to_a_length_by_the_servers_own_counts():
    for max_tokens in (10_000, 150, 60):  # the texts to learn by must fit too
        writer = await PromptWriter.learn(counter(max_tokens=max_tokens))
        for wanted in (64, 257, 4000):
            text = writer.write(wanted, random.Random(1))
            assert abs(await counter()(text) - wanted) <= 1
    assert writer.write(3, random.Random(1))  # less than the template alone: one word
    asked = draw_asked(writer, read_lengths("100-200"), read_lengths("5"), 50, seed=3)
    assert len({one.prompt for one in asked}) == 50
    assert {one.max_tokens for one in asked} == {5}
    assert asked == draw_asked(writer, read_lengths("100-200"), read_lengths("5"), 50, seed=3)
    with pytest.raises(ServerError):
        await PromptWriter.learn(counter(max_tokens=40))


async def test_counts_that_do_not_grow_with_the_text_are_told():
    with pytest.raises(ClientError, match="prompts can't be written to a length"):
        await PromptWriter.learn(counter(tokens_a_word=0))


async def test_a_file_of_ones_own_requests_is_read_line_by_line(tmp_path):
    path = tmp_path / "own.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a"}, {"messages": messages, "max_tokens": 5}]
    lines.append({"prompt": "c", "output_tokens": 7})
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_asked(path) == (
        Asked("a"),
        Asked(messages=messages, max_tokens=5),
        Asked("c", max_tokens=7),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense", "line 2: is not JSON"),
        (b'"a"', "line 2: is no object"),
        (b"{}", 'line 2: has "prompt" or "messages", one of them'),
        (b'{"prompt": "a", "messages": [{"role": "user"}]}', "one of them"),
        (b'{"prompt": ""}', '"prompt" is a string with text'),
        (b'{"prompt": 1}', '"prompt" is a string with text'),
        (b'{"messages": []}', '"messages" is a list of objects'),
        (b'{"messages": [{"content": "a"}]}', '"messages" is a list of objects'),
        (b'{"prompt": "a", "max_tokens": 0}', '"max_tokens" is a number of 1 to'),
        (b'{"prompt": "a", "max_tokens": true}', '"max_tokens" is a number of 1 to'),
        (b'{"prompt": "\\ud800"}', "has half a character"),
        (b"\xff", "line 2: is not UTF-8"),
    ],
)
async def test_a_line_that_is_no_request_is_named(tmp_path, line, said):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=r".") as error:
        read_asked(path)
    assert said in str(error.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_asked(path)


async def test_a_terminal_gets_a_bar_of_requests_and_the_time_left():
    out, now_s = Terminal(), [0.0]
    with RequestProgress(8, out, clock=lambda: now_s[0]) as progress:
        assert out.getvalue().endswith("·" * 24 + " 0 of 8 requests")
        now_s[0] = 30.0
        for _ in range(2):
            progress.add()
        *_, shown = out.getvalue().split("\r")
        assert shown == "\x1b[K" + "█" * 6 + "·" * 18 + " 2 of 8 requests, 1 min 30 s left"
    assert out.getvalue().endswith("\r\x1b[K")


async def test_the_command_measures_prints_and_writes(tmp_path):
    engine = FakeEngine()
    flags = ["--requests", "5", "--rate", "500", "--prompt-tokens", "60", "--answer-tokens", "7"]
    async with run_server(make_app(engine)) as url:
        flags += ["--slo-ttft", "60", "--json", str(tmp_path / "b.json"), "--details"]
        command = [sys.executable, "-m", "bitwatt", "bench", url, *flags]
        process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
        out, error = await process.communicate()
    assert (process.returncode, error) == (0, b"")
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (5, 35)
    assert result["request_rate"] == 500.0
    assert result["goodput_share"] == 1.0
    assert len(result["ttfts"]) == 5
    assert len(engine.submitted) >= 2 + 1 + 5  # to learn the tokens of words, and to warm up
    assert out.startswith(b"tiny: 5 requests, 500 a second\n")


async def test_the_command_asks_ones_own_prompts_and_writes_to_a_pipe(capsys, tmp_path):
    engine = FakeEngine()
    path = tmp_path / "own.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "b"}\n')
    async with run_server(make_app(engine)) as url:
        asked = "bench", url, "--prompts", str(path)
        status, out, _ = await run_command(capsys, *asked, "--json", "-")
        refused = await run_command(capsys, *asked, "--api", "completions")
    assert status == 0
    result = json.loads(out)
    assert (result["num_prompts"], result["completed"], result["max_concurrency"]) == (2, 2, 8)
    assert 0 in engine.submitted[-1].sampling.stop_token_ids  # its own end is not ignored
    assert refused[0] == 1
    assert f"{path} has messages, which --api completions hasn't" in refused[2]


async def test_the_command_fails_where_nothing_is_answered(capsys):
    status, _, error = await run_command(capsys, "bench", "http://127.0.0.1:1")
    assert status == 1
    assert error.startswith("bitwatt bench: http://127.0.0.1:1 can't be reached")
    assert INTERRUPTED == 130
    status, _, error = await run_command(capsys, "bench", "--prompt-tokens", "many")
    assert (status, "write 128, 16-256 or lognormal" in error) == (2, True)
    status, _, error = await run_command(capsys, "bench", "--details")
    assert (status, "--details are of --json" in error) == (2, True)


async def test_a_server_that_knows_only_openais_fields_is_measured_too():
    """What no other server knows is a header, and what few know is a flag."""
    sent = []

    async def answer(request):
        sent.append((json.loads(request.content), request.headers))
        events = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        ]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        run = await run_bench(make_server(http), make_plan(1, ignore_eos=False))
    assert len(run.answers) == 1
    [(body, headers)] = sent
    assert {*body} <= {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "seed",
    }
    assert headers["content-type"] == "application/json"
