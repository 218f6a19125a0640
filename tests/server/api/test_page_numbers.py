"""The page's own arithmetic and words, run by Node against what was worked out by hand."""

import json
import math
import random

import pytest

from tests.server.api.node import evaluate

pytestmark = pytest.mark.needs_program("node")


def test_statistics_are_what_they_are_by_hand():
    expected = {
        "s.quantile([4, 1, 3, 2], 0.25)": 1.75,
        "s.median([2, 1])": 1.5,
        # Medians 4 and 2; the pairs alone give 2/1, 4/2 and 9/3.
        's.compare([2, 4, 9], [1, 2, 3], "higher").gain': 2,
        's.compare([2, 4, 9], [1, 2, 3], "higher").high': 3,
        's.compare([2, 4, 9], [1, 2, 3], "lower").gain': 0.5,
        # A pair without a value on one side is no pair.
        's.compare([null, 4], [1, 2], "higher").a.n': 1,
        's.compare([0], [1], "higher")': None,
        's.compare([], [], "higher")': None,
        "s.verdict({ low: 1.1, high: 2 })": "better",
        "s.verdict({ low: 0.5, high: 0.9 })": "worse",
        "s.verdict({ low: 0.9, high: 1.1 })": "unclear",
        "s.verdict({ low: 1, high: 1 })": "equal",
        # Five rounds in 5 s are a second each, in which 0.4 s for 8 tokens are 20 tokens.
        "s.fittingTokens({ tokens: 8, windows: 5, fitS: 5 }, 0.4)": 20,
        "s.fittingTokens({ tokens: 8, windows: 5, fitS: 5 }, 12)": 8,
        "s.fittingTokens({ tokens: 8, windows: 5, fitS: 5 }, 0.001)": 128,
        # Of the longer text, by characters, until the two part; as mirrors count it.
        's.agreement("the cat", "the dog sat")': 4 / 11,
        's.agreement("the", "the dog")': 3 / 7,
        's.agreement("🦊a", "🦊b")': 0.5,
        's.agreement("the", "the")': 1,
        's.agreement("", "")': 1,
        's.agreement("", "a")': 0,
    }
    assert evaluate(expected, s="statistics.js", f="format.js") == list(expected.values())


def test_an_answers_times_are_the_servers_where_it_tells_them_else_the_browsers():
    told = "{ time_to_first_token_s: 0.5, decode_s: 2 }"
    at_once = "{ time_to_first_token_s: 0.5, decode_s: 0 }"

    def read(num_pieces, *, first=1000, last=1500):
        reading = {"startedAt": 0, "firstAt": first, "lastAt": last, "numPieces": num_pieces}
        return json.dumps(reading)

    def times(ttft, latency, decode, is_late=False):
        return {"ttft": ttft, "latency": latency, "decode": decode, "isReadLate": is_late}

    expected = {
        # Ten tokens after the first in 2 s, whatever a late browser read.
        f"t.timesOf(11, {read(1)}, {told})": times(0.5, 2.5, 5),
        f"t.timesOf(1, {read(1)}, {at_once})": times(0.5, 0.5, None),
        f"t.timesOf(11, {read(8)}, {at_once})": times(0.5, 0.5, None),
        # Ten tokens after the first in half a second.
        f"t.timesOf(11, {read(8)})": times(1, 1.5, 20),
        f"t.timesOf(11, {read(7)})": times(1, 1.5, None, is_late=True),
        f"t.timesOf(11, {read(8, last=1000)})": times(1, 1, None),
        f"t.timesOf(3, {read(3)})": times(1, 1.5, None),
        f"t.whyNoDecode(1, {read(2)})": "one token: no time between tokens",
        f"t.whyNoDecode(9, {read(2)}, {at_once})": "all in one step: no time between tokens",
        f"t.whyNoDecode(9, {read(1)})": "all in one chunk: no time between tokens",
        f"t.whyNoDecode(9, {read(7)})": "too few chunks to time: 7, 8 needed",
        "[1, 1, 2].reduce((r, at) => (r.take(at), r), t.newReading(0)).numPieces": 2,
    }
    assert evaluate(expected, t="timing.js") == list(expected.values())


def test_numbers_are_shown_as_people_read_them():
    expected = {
        "f.bytes(7330000)": "7.33 MB",
        "f.bytes(0)": "0 B",
        "f.seconds(0.0453)": "45.3 ms",
        "f.seconds(2)": "2 s",
        "f.rate(1342.4)": "1,342 tok/s",
        "f.joules(1.125e-6)": "1.13 µJ",
        "f.joules(0.25)": "250 mJ",
        "f.dollars(0.09)": "$0.09",
        "f.dollars(0.00123)": "$0.00123",
        "f.times(3.6123)": "3.61×",
        "f.bytes(300000, { beside: [9.71e6] })": "0.3 MB",
        "f.bytes(0, { beside: [2.1e6] })": "0 MB",
        "f.bytes(300000, { beside: [4.8e9] })": "300 kB",
        "f.bytes(4.8e9, { beside: [300000] })": "4,800,000 kB",
        "f.bytes(1500, { isBare: true })": "1.5",
        "f.joules(8.19e-7, { beside: [3.15e-6] })": "0.819 µJ",
        "f.rate(1342.46, { count: 5 })": "1,342.5 tok/s",
        "f.dollars(16.6667, { count: 4 })": "$16.667",
        "f.percent(0.02389)": "2.4%",
        "f.percent(0.6925)": "69%",
        "f.percent(14.018)": "1,400%",
        "f.times(0.5)": "0.5×",
        "f.times(0.066667)": "0.067×",
        "f.times(48.13)": "48.1×",
        "f.millions(13_100_000)": "13.1M",
        "f.millions(2.4e9)": "2.4B",
        "f.when(0, 3_600_000)": "00:00",
        "f.when(0, 1e12)": "1 Jan 1970, 00:00",
    }
    assert evaluate(expected, s="statistics.js", f="format.js") == list(expected.values())


SHOWN = {"f.bytes": 1e6, "f.rate": 1e3, "f.seconds": 0.1, "f.joules": 1e-6, "f.dollars": 0.5}


@pytest.mark.parametrize("show", SHOWN)
def test_a_ratio_and_a_percentage_follow_from_the_values_beside_them(show):
    """ "2.39% less" stood beside 366 MB against 374 MB, of which a reader makes 2.1%."""
    rng = random.Random(show)
    pairs = [
        (SHOWN[show] * rng.uniform(1, 9), rng.choice([rng.uniform(0.9, 1.1), rng.uniform(0.1, 9)]))
        for _ in range(100)
    ]
    said = "(x, y) => f.times(y / x) + f.percent(Math.abs(1 - x / y))"
    told = evaluate(
        [
            f"[...f.inOneUnit({a}, {a * ratio}, {show}, {said}),"
            f" f.times({ratio}), f.percent({abs(1 - 1 / ratio)})]"
            for a, ratio in pairs
        ],
        f="format.js",
    )
    for shown_a, shown_b, times, percent in told:
        (a, unit_of_a), (b, unit_of_b) = split(shown_a), split(shown_b)
        assert unit_of_a == unit_of_b
        for found, shown in ((b / a, times), (100 * abs(1 - a / b), percent)):
            value, _ = split(shown)
            num_digits = 3 if shown == times and value >= 1 else 2
            half_a_last_digit = 0.5 * 10 ** (math.floor(math.log10(value)) + 1 - num_digits)
            assert abs(found - value) <= 1.0001 * half_a_last_digit, (shown_a, shown_b, shown)


def split(shown):
    """Return the number and the unit."""
    number = shown.lstrip("$").rstrip("×%").split()[0].replace(",", "")
    return float(number), shown.split()[1:]


def side(name, *, step_bytes, held, rate, weights="ternary", num_parameters=5_770_000):
    memory = {"packed_weights_bytes": held, "embedding_bytes": 0, "other_weights_bytes": 0}
    return {
        "name": name,
        "weights": weights,
        "dtype": "bfloat16",
        "num_parameters": num_parameters,
        "memory": memory,
        "roofline": {"step_bytes": step_bytes, "unavailable": None},
        "read_bytes_per_s": rate,
    }


def test_a_rooflines_words_are_true_of_a_small_model_and_of_a_large_one():
    """A low share of 5.77M parameters was called "a weak baseline", beside no baseline at all."""
    small = side("builtin", step_bytes=3.38e6, held=3.64e6, rate=29.5e9)
    large = side("b1.58", step_bytes=1.16e9, held=1.18e9, rate=53e9, num_parameters=2_400_000_000)
    told = evaluate(
        [f"r.aboutRoofline({json.dumps({'a': model})})" for model in (small, large)],
        r="roofline.js",
    )
    assert "builtin 3.38 of 3.64 MB at 29.5 GB/s, 0.115 ms" in told[0]
    assert "b1.58 1.16 of 1.18 GB at 53 GB/s, 21.9 ms" in told[1]
    for words in told:
        assert "tables of which a token takes a row" in words
        assert "slow kernels only where the reading takes milliseconds" in words
        assert "twin" not in words
        assert "baseline" not in words


def test_only_a_small_pair_is_told_that_its_ratios_may_not_be_a_larger_models():
    small = side("builtin", step_bytes=1, held=1, rate=1)
    large = small | {"num_parameters": 2_400_000_000}
    unknown = small | {"num_parameters": None}
    told = evaluate(
        [f"p.whyOfItsSize({json.dumps(a)}, {json.dumps(a)})" for a in (small, large, unknown)],
        p="pair.js",
    )
    assert told[0].startswith("At 5.77M parameters fixed costs weigh more")
    assert "bitwatt serve MODEL --compare" in told[0]
    assert told[1:] == ["", ""]


def test_a_twin_on_another_server_is_said_to_be_timed_with_the_way_there():
    told = evaluate(
        ["p.overHop({ name: 'twin', is_remote: true })", "p.overHop({ name: 'twin' })"], p="pair.js"
    )
    assert told == ["The times of twin include the way to its server and back. ", ""]


def test_a_sentence_says_what_is_saved_what_it_costs_and_what_is_not_known():
    """Three ratios, two dashes and what is above 1 had to be put together by who read them."""

    def model(name, weights, held, whole, bits=None, reason="no counter"):
        quality = None if bits is None else {"bits_per_byte": bits, "evaluation": "one"}
        found = side(name, step_bytes=1, held=held, rate=1, weights=weights)
        energy = {"energy": {"reason": reason}, "device": "cpu"}
        return found | energy | {"rss_anon_bytes": whole, "quality": quality}

    def said(a, b, **figures):
        agreement = figures.pop("agreement", None)
        result = {"figures": figures, "agreement": agreement} if figures else None
        return f"t.summaryOf({json.dumps({'a': a, 'b': b})}, {json.dumps(result)})"

    def ratio(gain, low=None, high=None):
        return {"gain": gain, "low": low or gain, "high": high or gain}

    ternary = model("m", "ternary", 25, 200, bits=1.01)
    twin = model("m-twin", "dense", 100, 250, bits=1)
    metered = [each | {"energy": {"reason": None}} for each in (ternary, twin)]
    unrated = [each | {"quality": None, "rss_anon_bytes": None} for each in metered]
    expected = {
        said(ternary, twin, throughput=ratio(1.68)): (
            "Ternary weights: 75% less memory for weights (20% less in all), 68% more tokens a "
            "second, quality 1% worse. Energy can't be measured here."
        ),
        said(*metered): (
            "Ternary weights: 75% less memory for weights (20% less in all), quality 1% worse. "
            "Speed is not measured yet. Energy is not measured yet."
        ),
        said(*unrated, throughput=ratio(3.2), energy=ratio(4), agreement={"share": 0.5}): (
            "Ternary weights: 75% less memory for weights, 3.20× the tokens a second, answers that "
            "agree by 50%, 75% less energy. "
        ).rstrip(),
        said(*unrated, throughput=ratio(1.1, low=0.9, high=1.3), energy=ratio(0.5)): (
            "Ternary weights: 75% less memory for weights, speed unclear, 100% more energy. "
            "Quality is unknown."
        ),
        # Of two models neither of which is ternary, and where ternary loses.
        said(twin, twin | {"name": "other"}, throughput=ratio(1)): (
            "m-twin: as much memory for weights (as much in all), the same speed, the same "
            "quality. Energy can't be measured here."
        ),
        said(twin | {"weights": "ternary"}, ternary, throughput=ratio(0.5)): (
            "Ternary weights: 300% more memory for weights (25% more in all), 50% fewer tokens a "
            "second, quality 0.99% better. Energy can't be measured here."
        ),
        "t.summaryOf({ a: {} }, null)": "",
    }
    assert evaluate(expected, t="summary.js") == list(expected.values())
