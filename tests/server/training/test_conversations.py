import re
from collections import Counter

import pytest
from bitwatt.evaluation.arithmetic import is_held_out_sum
from bitwatt.evaluation.names import load_names
from bitwatt.evaluation.questions import HELD_OUT_PHRASINGS, answer, held_out_questions
from bitwatt.training.conversations import Conversation, conversations


@pytest.fixture(scope="module")
def taught() -> list[Conversation]:
    return conversations()


def test_the_same_seed_gives_the_same_conversations(taught: list[Conversation]):
    assert conversations() == taught
    assert conversations(seed=1) != taught


def test_conversations_end_with_an_answer_and_nothing_is_empty(taught: list[Conversation]):
    for talk in taught:
        assert talk.messages[-1].role == "assistant"
        assert talk.messages[-2].role == "user"
        assert all(message.content == message.content.strip() != "" for message in talk.messages)


def test_no_held_out_question_is_taught_in_any_spelling(taught: list[Conversation]):
    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^\w.+ ]", "", text).casefold().split()).rstrip(".")

    questions = {plain(message.content) for talk in taught for message in talk.messages}
    assert not questions & {plain(question.text) for question in held_out_questions()}
    fixed = [
        [plain(part).removeprefix("please ") for part in phrasing.split("{}")]
        for phrasings in HELD_OUT_PHRASINGS.values()
        for phrasing in phrasings
    ]
    for before, after in fixed:
        ending = f" {re.escape(after)}" if after else ""
        pattern = re.compile(rf"(.* )?{re.escape(before)} \S+{ending}( please be brief)?")
        assert not [question for question in questions if pattern.fullmatch(question)], before


def test_every_fact_is_taught_in_many_phrasings(taught: list[Conversation]):
    answers = Counter(talk.messages[-1].content for talk in taught)
    for name in load_names():
        purpose = answer(name, "purpose")
        assert purpose is not None
        assert answers[purpose] >= 24
        signature = answer(name, "signature")
        if signature is not None:
            assert answers[signature] >= 20


def test_sums_are_right_and_none_of_them_is_held_out(taught: list[Conversation]):
    sums = [
        tuple(map(int, found.groups()))
        for talk in taught
        if (found := re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", talk.messages[-1].content))
    ]
    assert len(sums) > 15_000
    assert all(a + b == c for a, b, c in sums)
    assert not any(is_held_out_sum(a, b) for a, b, _ in sums)
