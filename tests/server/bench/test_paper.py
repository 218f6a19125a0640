"""The paper's tables are filled, marked where extrapolated, and say why where they can't be."""

import json

import pytest
from bitwatt.bench import paper
from bitwatt.bench.paper import QUICK, Effort, bench_paper, line_through
from bitwatt.bench.paper_figures import PAPER_SIZES
from bitwatt.bench.paper_report import paper_as_markdown
from bitwatt.model.presets import PRESETS
from bitwatt.telemetry.energy.counter import Unavailable

from tests.extent import TEST_ALL

NO_COUNTER = Unavailable("no_powercap", "nothing here counts joules")


class FakeCounter:
    """Counts a joule a read."""

    source = "rapl"
    device = "package-0"
    poll_s = 0.1

    def __init__(self):
        self.joules = 0.0

    def read_joules(self):
        self.joules += 1
        return self.joules

    def state(self):
        return None

    def close(self):
        pass


def test_a_figure_of_all_layers_lies_on_the_line_through_two_depths():
    assert line_through([(1, 5.0), (3, 9.0)], 80) == 9 + 2 * 77
    assert line_through([(1, 5.0), (3, 5.0)], 80) is None
    assert line_through([(24, 7.5)], 24) == 7.5


def test_the_shapes_have_the_sizes_of_their_names():
    for name, billions in {"700M": 0.68, "1.3B": 1.21, "3B": 3.22, "3.9B": 3.93}.items():
        config = PRESETS[name]
        linears = config.num_layers * paper._layer_parameters(config)
        assert linears == pytest.approx(billions * 1e9, rel=0.01)
    assert [round(size.memory_gain, 2) for size in PAPER_SIZES.values()] == [2.6, 2.93, 3.55, 3.32]


def test_models_that_do_not_fit_are_called_so_and_what_is_arithmetic_stands(monkeypatch):
    monkeypatch.setattr(paper, "_free_bytes", lambda: 1e6)
    monkeypatch.setattr(paper, "_total_bytes", lambda: 20e9)
    lines: list[str] = []
    tables = bench_paper(QUICK, report=lines.append, counter=NO_COUNTER)
    assert all("don't fit in 0.0 GB" in row["unavailable"] for row in tables["sizes"].values())
    assert len(lines) == 5
    # 512 tokens take 80 layers · 2 · 8 heads · 128 · 2 bytes each: 168 MB
    assert tables["throughput"]["largest_batch"]["here"] == {"ternary": 10, "dense": 0}
    assert tables["throughput"]["largest_batch"]["paper"]["ternary"] == 845
    arithmetic = tables["energy"]["arithmetic"]["3B"]
    assert arithmetic["linears"] == pytest.approx(71.43, abs=0.01)
    text = paper_as_markdown(json.loads(json.dumps(tables)))
    assert "nothing here counts joules" in text
    assert "doesn't fit" in text
    assert "16 → 176" in text


@pytest.mark.slow(90)
@pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it")
def test_a_size_is_measured_at_two_depths_beside_the_papers_figures():
    """Two layers of the 700M shape: every figure is there, none is judged."""
    effort = Effort(
        sizes=("700M",),
        throughput_size="700M",
        max_layers=2,
        repeats=1,
        num_threads=1,
        read_bytes=1 << 22,
    )
    tables = bench_paper(effort, report=lambda _: None, counter=FakeCounter())
    row = tables["sizes"]["700M"]
    for weights in ("ternary", "dense"):
        figures = row[weights]
        assert (figures["num_layers_run"], figures["num_layers"]) == (2, 24)
        assert figures["is_extrapolated"]
        assert figures["floor_ms"] > 0
        assert figures["memory_gb"] is None or figures["memory_gb"] > figures["weights_gb"]
        assert tables["throughput"][weights]["decode_ms"].keys() == {"1", "16"}
    assert row["gain"]["weights"] == pytest.approx(4.24, abs=0.01)
    assert row["paper"]["dense_gb"] == 2.08
    assert tables["energy"]["source"] == "rapl"
    text = paper_as_markdown(json.loads(json.dumps(tables)))
    assert "| LLaMA 700M | 2 of 24 | 1.56 |" in text
    assert "Energy is package-0's, read from rapl." in text
