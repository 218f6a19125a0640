"""The page's own arithmetic, run by Node against values worked out by hand."""

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
        # Ten tokens after the first in half a second.
        "s.decodeRate(11, 8, 1000, 1500)": 20,
        "s.decodeRate(11, 7, 1000, 1500)": None,
        "s.decodeRate(11, 8, 1000, 1000)": None,
        "s.whyNoDecodeRate(1, 2)": "one token: no time between tokens",
        "s.whyNoDecodeRate(9, 1)": "one burst: no time between tokens",
        "s.whyNoDecodeRate(9, 7)": "7 bursts: too few to time",
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
        "f.times(0.5)": "0.5×",
        "f.times(48.13)": "48.1×",
        "f.millions(13_100_000)": "13.1M",
        "f.millions(2.4e9)": "2.4B",
        "f.when(0, 3_600_000)": "00:00",
        "f.when(0, 1e12)": "1 Jan 1970, 00:00",
    }
    assert evaluate(expected, s="statistics.js", f="format.js") == list(expected.values())
