"""The scripts of the benchmark of speculation are what its engines answer."""

from bitwatt.bench.speculation import Script, _Pair

from tests.server.engine.test_exactness import make_model


def test_a_script_is_answered_with_drafts_and_without() -> None:
    words = [7, 11, 13, 17] * 6
    pair = _Pair(make_model("torch"))
    figures = pair.measure([Script(words, [*words[:12], 5]), Script(words, [*words[4:], 9])], 2)
    pair.close()
    assert figures["num_accepted_tokens"] > 0
    assert figures["ratio"]["n"] == 1
