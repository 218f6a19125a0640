from collections import Counter

import pytest
from bitwatt.evaluation.names import load_names
from bitwatt.evaluation.questions import (
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    TOPICS,
    held_out_questions,
    is_right,
)


def test_there_are_a_thousand_names_each_once_with_a_purpose():
    names = load_names()
    assert len(names) == len({name.path for name in names}) == 1000
    assert all(name.purpose.strip() == name.purpose != "" for name in names)
    assert {"len", "str.join", "os.path.join", "json.dumps", "collections.OrderedDict"} <= {
        name.path for name in names
    }


def test_no_phrasing_is_both_trained_on_and_held_out():
    for topic in TOPICS:
        assert not set(PHRASINGS[topic]) & set(HELD_OUT_PHRASINGS[topic])


def test_five_hundred_questions_are_asked_the_same_every_time():
    questions = held_out_questions()
    assert questions == held_out_questions()
    assert len({question.text for question in questions}) > 495
    counts = Counter(question.topic for question in questions)
    assert counts == {"purpose": 220, "signature": 110, "module": 100, "members": 70}


@pytest.mark.parametrize(
    "given",
    [
        "Return the length.",
        " return the  length\n\nAnd more.",
        "Return the `length`. It counts.",
        "Return the length",
    ],
)
def test_the_first_sentence_alone_decides(given: str):
    assert is_right(given, "Return the length.")


@pytest.mark.parametrize(
    "given", ["", "Return the lengths.", "Return the length of it.", "It is: Return the length."]
)
def test_another_first_sentence_is_wrong(given: str):
    assert not is_right(given, "Return the length.")


def test_a_point_within_a_name_ends_no_sentence():
    assert not is_right("`os.path.exists(path)`", "`os.path.join(a, *p)`")
    assert is_right("`f(x=1.5, *, y)`.", "`f(x=1.5, *, y)`")
