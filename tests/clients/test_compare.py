"""Comparisons: order of windows, figures worked out by hand, honest gaps, the command."""

import asyncio
import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import bitwatt.telemetry.energy
import httpx
import msgspec
import pytest
from bitwatt.api.app import create_app
from bitwatt.cli import main
from bitwatt.engine.messages import EngineStats, MemoryUse, Roofline
from bitwatt.telemetry.metrics import Metrics
from bitwatt_client import (
    ClientError,
    ComparisonError,
    LoadPlan,
    Window,
    Work,
    as_json,
    as_table,
    compare,
)
from bitwatt_client.compare import summarize
from bitwatt_client.errors import told
from bitwatt_client.exposition import parse_samples
from bitwatt_client.figures import ENERGY_REASONS, Measured, roofline_figure
from bitwatt_client.plot import save_png
from bitwatt_client.report import _shown, verdict
from bitwatt_client.server import Answer, Server
from bitwatt_client.statistics import Spread

from tests.command_line import run_command
from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_info,
    make_model,
    make_settings,
    run_server,
)

WORK = Work(prompts=("p",), num_requests=2, concurrency=2, max_tokens=11)
MEMORY = (
    'bitwatt_memory_bytes{model_name="a",kind="packed_weights"} 100\n'
    'bitwatt_memory_bytes{model_name="a",kind="embedding"} 100\n'
    'bitwatt_memory_bytes{model_name="a",kind="kv_cache"} 800\n'
    'bitwatt_memory_bytes{model_name="b",kind="other_weights"} 700\n'
    'bitwatt_memory_bytes{model_name="b",kind="kv_cache"} 300\n'
)


def make_answer(*, ttft_s, decode_s, num_tokens=11):
    return Answer(
        text="x",
        num_prompt_tokens=3,
        num_tokens=num_tokens,
        finish_reason="length",
        started_s=100.0,
        text_times_s=(100.0 + ttft_s, 100.0 + ttft_s + decode_s),
    )


def make_window(*, wall_s, ttft_s=0.1, decode_s=1.0, failures=(), num_tokens=11):
    answer = make_answer(ttft_s=ttft_s, decode_s=decode_s, num_tokens=num_tokens)
    return Window(answers=(answer, answer), failures=failures, num_cut=0, wall_s=wall_s)


def joules_of(name, *, prefill, decode):
    """Return a model's counters, a server's other model's beside them, and what idling took."""
    return "".join(
        f'bitwatt_energy_joules_total{{model_name="{model}",phase="{phase}"}} {value}\n'
        for model, phase, value in [
            (name, "prefill", prefill),
            (name, "decode", decode),
            (name, "idle", 10 * decode),
            ("other", "decode", 20 * decode),
        ]
    )


def measured(window, *, name="a", joules=None, text=MEMORY):
    """Return a window in which a tenth of the joules went into prefill."""
    before = after = text
    if joules is not None:
        before += joules_of(name, prefill=100, decode=1000)
        after += joules_of(name, prefill=100 + joules / 10, decode=1000 + joules * 9 / 10)
    return Measured(
        name=name, window=window, before=parse_samples(before), after=parse_samples(after)
    )


def figures_of(comparison):
    return {figure.key: figure for figure in comparison.figures}


def make_comparison(*, rent=(None, None), num_windows=6, **of_b):
    a = [measured(make_window(wall_s=4.0, ttft_s=0.1, decode_s=1.0), joules=11.0)] * num_windows
    window_b = make_window(wall_s=2.0, ttft_s=0.3, decode_s=0.5, **of_b)
    b = [measured(window_b, name="b", joules=44.0)] * num_windows
    plan = LoadPlan(work=WORK, num_windows=num_windows, usd_per_hour=rent)
    return summarize(a, b, plan)


def test_figures_are_what_they_are_by_hand():
    found = figures_of(make_comparison(rent=(1.98, 3.96)))
    # 22 tokens in 4 s and in 2 s: a makes half as many.
    assert found["tokens_per_s"].a.median == 5.5
    assert found["tokens_per_s"].b.median == 11.0
    assert found["tokens_per_s"].gain.value == 0.5
    # 10 tokens after the first, in 1 s and in 0.5 s.
    assert found["decode_tokens_per_s"].a.median == pytest.approx(10)
    assert found["decode_tokens_per_s"].gain.value == pytest.approx(0.5)
    assert found["ttft_s"].gain.value == pytest.approx(3)
    assert found["e2e_s"].gain.value == pytest.approx(0.8 / 1.1)
    # 11 J and 44 J for 22 tokens.
    assert found["joules_per_token"].a.median == pytest.approx(0.5)
    assert found["joules_per_token"].gain.value == pytest.approx(4)
    # $1.98 an hour for 5.5 tok/s, 19 800 an hour, is $100 a million; $3.96 for 11 tok/s as well.
    assert found["usd_per_million_tokens"].a.median == pytest.approx(100)
    assert found["usd_per_million_tokens"].gain.value == pytest.approx(1)
    assert found["weights_bytes"].gain.value == 3.5
    assert found["memory_bytes"].gain.value == 1


def test_a_loss_is_called_a_loss():
    found = figures_of(make_comparison())
    assert verdict(found["tokens_per_s"]) == "worse"
    assert verdict(found["ttft_s"]) == "better"
    assert "0.50×" in as_table(make_comparison())


def test_an_interval_around_one_decides_nothing():
    walls = [(1.0, 2.0), (2.0, 1.0), (1.5, 1.5), (1.0, 2.0), (2.0, 1.0)]
    a = [measured(make_window(wall_s=wall)) for wall, _ in walls]
    b = [measured(make_window(wall_s=wall)) for _, wall in walls]
    found = summarize(a, b, LoadPlan(work=WORK, num_windows=5))
    assert verdict(figures_of(found)["tokens_per_s"]) == "no clear difference"


def test_energy_that_is_not_measured_is_null_with_its_reason():
    labels = 'model_name="a",source="none",reason="no counter on this machine"'
    told = f"bitwatt_energy_available{{{labels}}} 0\n"
    both = [measured(make_window(wall_s=4.0), text=MEMORY + told)] * 2
    comparison = summarize(both, both, LoadPlan(work=WORK, num_windows=2))
    energy = as_json(comparison)["figures"]["joules_per_token"]
    assert energy["a"] is energy["b"] is energy["gain"] is None
    assert energy["unavailable"] == "no counter on this machine"
    assert "unavailable: no counter on this machine" in as_table(comparison)


def test_a_counter_that_stood_still_is_no_zero():
    still = [measured(make_window(wall_s=4.0), joules=0.0)] * 2
    comparison = summarize(still, still, LoadPlan(work=WORK, num_windows=2))
    assert figures_of(comparison)["joules_per_token"].gain is None


def test_a_server_without_metrics_is_compared_by_its_streams_alone():
    bare = [Measured(name="a", window=make_window(wall_s=4.0))] * 2
    comparison = summarize(bare, bare, LoadPlan(work=WORK, num_windows=2))
    found = figures_of(comparison)
    assert found["tokens_per_s"].gain.value == 1
    assert found["weights_bytes"].unavailable == "the server reports no memory by kind"
    assert found["joules_per_token"].unavailable == "the server reports no energy"


def test_a_pair_with_a_failure_is_left_out_and_told():
    good, bad = (
        measured(make_window(wall_s=4.0, failures=failures)) for failures in ((), ("503: full",))
    )
    plan = LoadPlan(work=WORK, num_windows=2)
    comparison = summarize([good, bad], [good, good], plan)
    assert figures_of(comparison)["tokens_per_s"].a.n == 1
    assert comparison.notices[0] == "1 of 2 pairs of windows left out: 503: full"
    with pytest.raises(ComparisonError, match="503: full"):
        summarize([bad], [good], plan)


def test_unequal_work_is_told():
    [notice] = make_comparison(num_tokens=5).notices
    assert notice == "b gave 5 tokens an answer in place of 11: the work is not equal"


def test_the_picture_is_a_png(tmp_path):
    save_png(make_comparison(), tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def make_pair_app(**settings):
    """Return an application over `tiny` and `tiny-fp16`, and their engines."""
    metrics = Metrics()
    engines = {
        "tiny": FakeEngine(),
        "tiny-fp16": FakeEngine(
            info=make_info(
                weights="dense",
                memory=MemoryUse(
                    packed_weights_bytes=0,
                    embedding_bytes=200,
                    other_weights_bytes=1040,
                    kv_cache_bytes=1000,
                ),
            )
        ),
    }
    served = {
        name: make_model(engine, name=name, metrics=metrics) for name, engine in engines.items()
    }
    return create_app(served, make_settings(**settings), metrics), engines


@pytest.mark.anyio
async def test_windows_alternate_after_the_warm_up():
    app, engines = make_pair_app()
    order = []
    async with make_client(app) as http:
        comparison = await compare(
            Server(http, "http://localhost", "tiny"),
            Server(http, "http://localhost", "tiny-fp16"),
            LoadPlan(work=WORK, num_windows=2),
            on_window=lambda name, number, _: order.append((name, number)),
        )
    assert order == [(name, n) for n in (-1, 0, 1) for name in ("tiny", "tiny-fp16")]
    assert len(engines["tiny"].submitted) == len(engines["tiny-fp16"].submitted) == 6
    assert figures_of(comparison)["tokens_per_s"].a.n == 2
    assert figures_of(comparison)["weights_bytes"].gain.value == pytest.approx(4)


@pytest.mark.anyio
async def test_a_model_that_a_slower_backend_runs_than_could_is_told():
    app, engines = make_pair_app()
    engines["tiny"].info = make_info(fallback="the backend torch runs; install a compiler")
    async with make_client(app) as http:
        comparison = await compare(
            Server(http, "http://localhost", "tiny"),
            Server(http, "http://localhost", "tiny-fp16"),
            LoadPlan(work=WORK, num_windows=1),
        )
        assert await Server(http, "http://localhost", "other").fallback() is None
    told = "tiny: the backend torch runs; install a compiler"
    assert comparison.notices[0] == told
    assert f"Note: {told}." in as_table(comparison)
    assert as_json(comparison)["notices"][0] == told


@pytest.mark.anyio
async def test_each_models_decoding_is_held_against_its_own_roofline(tmp_path):
    app, engines = make_pair_app()
    for name, step_bytes in (("tiny", 100), ("tiny-fp16", 400)):
        engines[name].info = msgspec.structs.replace(
            engines[name].info, roofline=Roofline(step_bytes=step_bytes)
        )
        engines[name].delay_s = 0.005
    models = app.state.catalog.by_name
    async with make_client(app) as http:
        servers = [Server(http, "http://localhost", name) for name in models]
        assert "first idle seconds" in (await servers[0].roofline()).unavailable
        for model in models.values():
            model.metrics.on_stats(EngineStats(read_bytes_per_s=1e6))
        told = [await server.roofline() for server in servers]
        assert [(r.step_bytes, r.read_bytes_per_s) for r in told] == [(100, 1e6), (400, 1e6)]
        unknown = await Server(http, "http://localhost", "other").roofline()
        assert unknown.unavailable == "the server of other tells no roofline"
        comparison = await compare(*servers, LoadPlan(work=WORK, num_windows=1))
    assert "roofline_share" in figures_of(comparison)
    # 100 bytes at a million a second; no share of so small a model tells of its kernels.
    assert "tiny's roofline is 0.1 ms a step" in comparison.notices[0]
    assert sum("low share tells of slow kernels only" in told for told in comparison.notices) == 1
    # 10 tokens a second of 100 bytes, and 20 of 400, of a million a second.
    found = roofline_figure(figures_of(make_comparison())["decode_tokens_per_s"], tuple(told))
    assert found.a.median == pytest.approx(0.1)
    assert found.b.median == pytest.approx(0.8)
    comparison = replace(comparison, figures=(found,))
    assert re.search("roofline +0.1 .*% +0.8 .*% .*each of its own", as_table(comparison))
    assert as_json(comparison)["figures"]["roofline_share"]["gain"] is None
    save_png(comparison, tmp_path / "gain.png")
    missing = roofline_figure(
        figures_of(make_comparison())["decode_tokens_per_s"], (told[0], unknown)
    )
    assert missing.unavailable == unknown.unavailable


@pytest.mark.anyio
async def test_the_command_compares_two_models_of_one_server(tmp_path, capsys):
    app, _ = make_pair_app(api_key="k")
    args = ["--requests", "2", "--concurrency", "2", "--windows", "2", "--max-tokens", "4"]
    args += ["--json", str(tmp_path / "c.json"), "--png", str(tmp_path / "c.png")]
    async with run_server(app, api_key="k") as url:

        def run():
            with pytest.raises(SystemExit) as exit_:
                main(["compare", url, url, *args, "--api-key", "k"])
            return exit_.value.code

        assert await asyncio.to_thread(run) == 0
    captured = capsys.readouterr()
    assert "tiny against tiny-fp16" in captured.out
    assert "weights" in captured.out
    assert "tiny-fp16, window 2" in captured.err
    assert "\r" not in captured.err  # the bar is for terminals
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved["figures"]["weights_bytes"]["gain"]["value"] == pytest.approx(4)
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["compare", "ftp://x", "http://y"], "URL-A 'ftp://x': begins with http"),
        (["compare", "http://x", "http://y", "--requests", "0"], "BITWATT_CLIENT_REQUESTS"),
        (["chat", "nowhere"], "URL 'nowhere'"),
        (["chat", "http://127.0.0.1:99999"], "is no address: Port out of range"),
        (["chat", "http://[::1"], "is no address: Invalid IPv6 URL"),
        (["chat", "http:///v1"], "URL 'http:///v1': names no host"),
    ],
)
def test_a_wrong_argument_is_named(capsys, args, said):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["compare", "URL", "URL"], ["chat", "URL"]])
def test_a_server_that_is_not_there_ends_the_command(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([part.replace("URL", "http://127.0.0.1:1") for part in command])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert f"bitwatt {command[0]}: http://127.0.0.1:1 can't be reached: " in said
    assert "connection attempts failed" in said


def test_every_reason_for_no_joules_has_its_words():
    energy = Path(bitwatt.telemetry.energy.__file__).parent
    sources = [*energy.glob("*.py"), energy.parent / "metering.py"]
    text = "".join(path.read_text() for path in sources)
    codes = set(re.findall(r'Unavailable\(\s*"(\w+)"', text)) - {"loading", "stopped"}
    assert codes == ENERGY_REASONS.keys()


@pytest.mark.parametrize(
    ("spread", "unit", "largest", "shown"),
    [
        (Spread(median=1234.5, low=1000, high=1240, n=5), "tok/s", 1, "1234 ±120 tok/s"),
        (Spread(median=12.345, low=12.3, high=12.4, n=5), "tok/s", 1, "12.3 ±0.05 tok/s"),
        (Spread(median=0.0123, low=0.01, high=0.02, n=5), "s", 0.9, "12.3 ±5 ms"),
        (Spread(median=0.0123, low=0.01, high=0.02, n=5), "s", 1.2, "0.0123 ±0.005 s"),
        (Spread(median=3.2e7, low=3.2e7, high=3.2e7, n=1), "B", 9e7, "32 MB"),
        (Spread(median=3e5, low=3e5, high=3e5, n=1), "B", 9.7e6, "0.3 MB"),
    ],
)
def test_a_figure_has_no_exponent_and_the_unit_of_the_one_beside_it(spread, unit, largest, shown):
    assert _shown(spread, unit, largest) == shown


@pytest.mark.anyio
async def test_a_model_that_is_not_served_is_named_with_those_that_are():
    async with make_client(make_app()) as http:
        server = Server(http, "http://localhost", "nope")
        with pytest.raises(ClientError, match="serves no nope; its models are tiny"):
            await server.choose_model()


@pytest.mark.anyio
async def test_a_model_that_loads_is_waited_for_and_another_kind_of_server_is_not():
    loading = FakeEngine(is_ready=False)
    async with make_client(make_app(loading)) as http:
        assert await Server(http, "http://localhost", "tiny").is_loading()
    async with make_client(make_app()) as http:
        assert not await Server(http, "http://localhost", "tiny").is_loading()
        assert not await Server(http, "http://localhost/nowhere", "tiny").is_loading()


@pytest.mark.anyio
async def test_the_rent_that_the_server_was_told_is_read():
    async with make_client(make_app(usd_per_hour=2.5)) as http:
        assert await Server(http, "http://localhost", "tiny").usd_per_hour() == 2.5
    async with make_client(make_app()) as http:
        assert await Server(http, "http://localhost", "tiny").usd_per_hour() is None


def test_a_server_that_cannot_be_reached_is_named():
    request = httpx.Request("GET", "http://127.0.0.1:9/v1/models")
    error = httpx.ConnectError("All connection attempts failed", request=request)
    assert told(error) == "http://127.0.0.1:9 can't be reached: All connection attempts failed"


def test_words_agree_with_their_numbers():
    one = as_table(make_comparison(num_windows=1))
    assert "1 alternating window each of 2 requests" in one
    assert "Note: 1 pair of windows makes rough intervals; 5 or more are better." in one
    assert "Medians of windows ± half their interquartile range, without 1 warm-up window" in one
    assert "no rent is set (--usd-per-hour)" in one
    without = LoadPlan(work=WORK, num_warmups=0)
    both = [measured(make_window(wall_s=4.0))] * 2
    assert "interquartile range.\n" in as_table(summarize(both, both, without))


def test_a_servers_words_can_not_command_the_terminal():
    told = 'bitwatt_energy_available{model_name="a",reason="\x1b[2J"} 0\n'
    both = [measured(make_window(wall_s=4.0), text=MEMORY + told)] * 2
    assert "\x1b" not in as_table(summarize(both, both, LoadPlan(work=WORK, num_windows=2)))


@pytest.mark.anyio
@pytest.mark.parametrize("side", ["a", "b"])
async def test_the_command_refuses_a_wrong_model_before_any_window_runs(capsys, side):
    app, engines = make_pair_app()
    async with run_server(app) as url:
        wrong = f"--model-{side}", "tinny"
        status, _, said = await run_command(capsys, "compare", url, url, *wrong)
    assert status == 1
    assert said == f"bitwatt compare: {url} serves no tinny; its models are tiny, tiny-fp16\n"
    assert not any(engine.submitted for engine in engines.values())


@pytest.mark.anyio
async def test_ctrl_c_twice_ends_the_command_without_a_traceback():
    app, engines = make_pair_app()
    engines["tiny"].gate = asyncio.Event()
    async with run_server(app) as url:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bitwatt", "compare", url, url), stdout=-1, stderr=-1
        )
        while not engines["tiny"].running:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
    # The second may come when the interpreter has let go of its handlers; shells call both 130.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in error.decode()
