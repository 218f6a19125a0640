"""Stop strings: nothing of them leaks, nothing before them is lost."""

import pytest
from bitwatt.text.output import OutputText
from bitwatt.text.stops import StopMatcher
from bitwatt.text.vocabulary import Vocabulary
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_tokenizer
from tests.server.text.test_detokenizer import cut

VOCABULARY = Vocabulary(make_tokenizer())
LETTERS = st.text(alphabet="ab🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), min_size=1, max_size=4)


def before_first_stop(text, stops):
    """The definition: read on character by character; stop where a stop string completes."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=10))
def test_pieces_joined_are_the_text_before_the_first_stop(text, stops, cuts):
    matcher = StopMatcher(stops)
    pieces = [matcher.push(part) for part in cut(text, cuts)]
    pieces.append(matcher.finish())
    assert ("".join(pieces), matcher.stopped) == before_first_stop(text, stops)


@given(LETTERS, STOPS)
def test_nothing_of_a_stop_leaks_before_it_completes(text, stops):
    matcher = StopMatcher(stops)
    passed = ""
    expected, _ = before_first_stop(text, stops)
    for char in text:
        passed += matcher.push(char)
        assert expected.startswith(passed)


@given(LETTERS, STOPS)
def test_only_what_could_begin_a_stop_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    passed = "".join(matcher.push(char) for char in text)
    if matcher.stopped:
        return
    held = text[len(passed) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_that_spans_tokens_ends_the_text_and_its_tail_is_not_lost_when_it_breaks_off():
    matcher = StopMatcher(["</s>"])
    assert [matcher.push(part) for part in ["a<", "/", "s", "x"]] == ["a", "", "", "</sx"]
    assert [matcher.push(part) for part in ["b</", "s>c"]] == ["b", ""]
    assert matcher.stopped
    assert matcher.push("more") == "" == matcher.finish()


def test_tokens_after_the_one_that_completed_a_stop_are_not_used():
    token_ids = make_tokenizer().encode("the quick brown fox").ids
    output = OutputText(VOCABULARY, ["ck br"])
    assert output.push(token_ids) == "the qui"
    assert output.num_unused == len(token_ids) - 3


def output_of(pieces, stops, **options):
    """Return the text of these tokens, how many of them were used, and whether it stopped."""
    token_ids = [make_tokenizer().token_to_id(piece) for piece in pieces]
    output = OutputText(VOCABULARY, stops, **options)
    text = output.push(token_ids)
    return text + output.finish(), len(token_ids) - output.num_unused, output.stopped


@pytest.mark.parametrize("stops", [["<|user|>"], ["never", "<|user|>"], ["<|user|>", "<|end|>"]])
def test_a_stop_string_that_is_a_special_token_ends_the_text_at_it(stops):
    assert output_of(["a", "b", "<|user|>", "c"], stops) == ("ab", 3, True)


def test_other_special_tokens_end_nothing_and_hide_no_stop_string():
    assert output_of(["a", "<|end|>", "b", "c"], ["<|user|>", "ab"]) == ("", 3, True)
    assert output_of(["a", "<|end|>", "b"], ["<|user|>"]) == ("ab", 3, False)


def test_what_a_special_stop_finds_held_back_is_text():
    assert output_of(["a", "b", "<|user|>"], ["<|user|>", "abc"]) == ("ab", 3, True)
    assert output_of(["a", "ð", "<|user|>"], ["<|user|>"]) == ("a\ufffd", 3, True)


def test_a_special_token_spelled_in_letters_ends_the_text_as_well():
    letters = [*"a<|user|>b"]
    assert output_of(letters, ["<|user|>"]) == ("a", 9, True)


@pytest.mark.parametrize("stop", ["b", "<|user|>"])
def test_no_stop_string_ends_the_text_before_min_tokens(stop):
    tokens = ["a", stop, "c", stop, "d"]
    visible = "" if stop == "<|user|>" else stop
    assert output_of(tokens, [stop]) == ("a", 2, True)
    assert output_of(tokens, [stop], min_tokens=1) == ("a", 2, True)
    assert output_of(tokens, [stop], min_tokens=2) == (f"a{visible}c", 4, True)
    assert output_of(tokens, [stop], min_tokens=3) == (f"a{visible}c", 4, True)
    assert output_of(tokens, [stop], min_tokens=4) == (f"a{visible}c{visible}d", 5, False)


def test_a_stop_string_may_begin_before_min_tokens_and_end_after_it():
    assert output_of([*"xabcd"], ["abc"], min_tokens=3) == ("x", 4, True)
    assert output_of([*"xabcd"], ["abc"], min_tokens=4) == ("xabcd", 5, False)


@given(
    st.text(alphabet="abé🙂 ", max_size=30),
    st.lists(st.text(alphabet="abé🙂 ", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 60), max_size=20),
)
def test_streamed_tokens_give_the_text_before_the_first_stop(text, stops, cuts):
    output = OutputText(VOCABULARY, stops)
    pieces = [output.push(part) for part in cut(make_tokenizer().encode(text).ids, cuts)]
    pieces.append(output.finish())
    assert "".join(pieces) == before_first_stop(text, stops)[0]
