"""The benchmarks run and say what they measured; how fast is not a test's business."""

import gc
import json
import subprocess
import sys

import pytest
from bitwatt.bench import attention
from bitwatt.bench.attention import bench_attention
from bitwatt.bench.cpu import ModelProcess, bench_cpu, bench_dense, bench_groups
from bitwatt.bench.dense_child import DenseConfig, libraries

from tests.extent import TEST_ALL


def run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitwatt.bench", *names]
    return subprocess.run(command, capture_output=True, text=True)


def test_last_line_is_one_json_with_the_machine_and_each_figure_s_spread() -> None:
    ran = run("scheduler")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["machine"].keys() == {"cpu", "num_cpus", "python", "versions", "commit"}
    assert [entry["num_running"] for entry in result["scheduler"]] == [1, 64, 256]
    for entry in result["scheduler"]:
        spread = entry["us_per_step"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["n"] == 500


def test_an_unknown_benchmark_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitwatt.bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "speed" in capsys.readouterr().err


@pytest.mark.slow(100)
@pytest.mark.skipif(not TEST_ALL, reason="takes half a minute: BITWATT_TEST_ALL=1 runs it")
def test_models_are_measured_in_processes_of_their_own_and_compared() -> None:
    """One layer of the 700M shape: every figure is there, none is judged."""
    lines: list[str] = []
    result = bench_cpu(
        preset="700M",
        num_layers=1,
        repeats=2,
        num_threads=1,
        read_bytes=1 << 22,
        report=lines.append,
    )
    assert result["num_threads"] == 1
    ours = {"ternary", "ternary, int8 head", "16-bit"}
    assert result["models"].keys() == ours
    for figures in result["models"].values():
        assert figures["weights_bytes"] <= figures["rss_anon_bytes"]
        assert figures["step_bytes"] <= figures["weights_bytes"]
        for work in ("decode_1", "decode_8", "prefill"):
            spread = figures[work]["tokens_per_s"]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
            assert spread["n"] == 2
        assert figures["decode_1"]["of_roofline"]["median"] > 0
        assert figures["batch_8_to_1"]["n"] == 2
    for ratios in result["to_16_bit"].values():
        assert ratios["decode_1"]["n"] == 2
        assert 0 < ratios["weights_bytes"] < 1
    assert result["to_16_bit"].keys() == ours - {"16-bit"}
    assert any("16-bit" in line for line in lines)


def test_a_model_that_could_not_be_made_leaves_no_process_behind() -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        ModelProcess(DenseConfig("unknown", 1, "torch float32"))
    gc.collect()  # a pipe left open would warn, which fails a test


@pytest.mark.slow(50)
@pytest.mark.skipif(not TEST_ALL, reason="starts four processes: BITWATT_TEST_ALL=1 runs it")
def test_the_twin_is_measured_beside_each_library() -> None:
    lines: list[str] = []
    result = bench_dense(
        preset="700M",
        num_layers=1,
        repeats=2,
        num_threads=1,
        read_bytes=1 << 22,
        prompt_tokens=64,
        report=lines.append,
    )
    works = {"decode_1", "decode_8", "decode_32", "prefill"}
    assert result["models"].keys() == {"16-bit", *libraries()}
    assert result["16_bit_to_library"].keys() == set(libraries())
    for ratios in result["16_bit_to_library"].values():
        assert ratios.keys() == works
        assert all(0 < ratio["min"] <= ratio["median"] for ratio in ratios.values())
    num_weights = 4 * 1536**2 + 3 * 1536 * 4096 + 32000 * 1536
    assert result["models"]["torch float32"]["step_bytes"] == 4 * num_weights
    assert result["models"]["torch bfloat16"]["step_bytes"] == 2 * num_weights
    assert any("16-bit to the linears of torch float32" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not TEST_ALL, reason="starts four models: BITWATT_TEST_ALL=1 runs it")
def test_scales_of_groups_are_measured_beside_those_of_rows() -> None:
    lines: list[str] = []
    results = bench_groups(
        num_layers=1,
        num_threads=1,
        repeats=2,
        read_bytes=1 << 22,
        prompt_tokens=64,
        report=lines.append,
    )
    assert [result["preset"] for result in results] == ["Bonsai 1.7B", "Bonsai 4B"]
    for result in results:
        assert result["models"].keys() == {"groups of 128", "rows"}
        assert result["to_rows"]["prefill"]["n"] == 2
        # 1/64 of a byte a weight more, of 2 bits: a scale of 16 bits to each 128.
        assert 1.05 < result["to_rows"]["weights_bytes"] < 1.07
    assert any("groups of 128 to rows" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not TEST_ALL, reason="starts two models: BITWATT_TEST_ALL=1 runs it")
def test_attention_over_both_caches_is_measured_by_itself_and_in_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_CACHED_TOKENS", 1200)  # two caches, not 109
    lines: list[str] = []
    result = bench_attention(
        presets=("700M",),
        contexts=[600],
        num_layers=1,
        repeats=2,
        num_threads=1,
        read_bytes=1 << 22,
        report=lines.append,
    )
    figures = result["700M"]["600"]
    assert figures.keys() == {"attention_decode", "attention_prefill", "decode", "prefill"}
    for figure in figures.values():
        for spread in (figure["int8"]["ms"], figure["bfloat16"]["ms"], figure["ratio"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
            assert spread["n"] == 2
    assert figures["attention_decode"]["int8"]["of_roofline"]["median"] > 0
    assert len(lines) == len(figures)
