from pathlib import Path

import pytest
from bitwatt.training.conversations import MAX_ANSWER_CHARACTERS, conversations_from
from bitwatt.training.corpus import Corpus, in_fixed_shuffle, is_held_out, load_corpus

MODULE = '''"""Fold and unfold paper."""

import os


def fold(sheet, times: int = 1) -> "Sheet":
    """Return the sheet folded in half.

    A second paragraph.
    """
    return sheet.halved(times)


def _crease(sheet):
    """Not public."""


class Sheet:
    """A piece of paper that can be folded."""

    def halved(self, times):
        """Return a new sheet of half the size."""
'''


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_corpus_is_the_same_every_time(tmp_path: Path):
    for name in ("b.py", "a.py", "pack/__init__.py", "test/test_a.py", "_sysconfigdata_x.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODULE.replace("paper", name))
    first, second = load_corpus(tmp_path), load_corpus(tmp_path)
    assert first == second
    names = {document.name for document in first.train.documents + first.held_out.documents}
    assert names == {"a.py", "b.py", "pack/__init__.py"}


def test_no_document_or_conversation_is_on_both_sides(corpus: Corpus):
    train = {document.name for document in corpus.train.documents}
    held_out = {document.name for document in corpus.held_out.documents}
    assert train
    assert held_out
    assert not train & held_out
    assert all(is_held_out(name) for name in held_out)
    assert not any(is_held_out(name) for name in train)
    for side, names in ((corpus.train, train), (corpus.held_out, held_out)):
        sources = {talk.name.rpartition(":")[0] for talk in side.conversations}
        assert {name for name in sources if not name.startswith("small-talk/")} <= names


def test_tests_installed_packages_and_build_facts_stay_out(corpus: Corpus):
    for document in corpus.train.documents + corpus.held_out.documents:
        assert not {"test", "tests", "site-packages"}.intersection(document.name.split("/"))
        assert "_sysconfigdata" not in document.name


def test_conversations_end_with_an_answer_of_bounded_length(corpus: Corpus):
    assert len(corpus.train.conversations) > 1000
    for talk in corpus.train.conversations:
        assert talk.messages[-1].role == "assistant"
        for message in talk.messages:
            assert message.content == message.content.strip() != ""
            if not message.content.startswith(("```", "`")):
                assert len(message.content) <= MAX_ANSWER_CHARACTERS


def test_questions_are_answered_from_docstrings_signatures_and_modules():
    talks = list(conversations_from("paper.py", MODULE))
    answers = [
        message.content
        for talk in talks
        for message in talk.messages
        if message.role == "assistant"
    ]
    assert "Fold and unfold paper." in answers
    assert "Return the sheet folded in half." in answers
    assert "```python\ndef fold(sheet, times: int=1) -> 'Sheet'\n```" in answers
    assert "`fold` is a function of the module `paper`." in answers
    assert "`Sheet` is a class of the module `paper`." in answers
    assert not any("_crease" in answer for answer in answers)


def test_a_file_that_does_not_parse_gives_no_conversations():
    assert list(conversations_from("broken.py", "def (:")) == []


def test_fixed_shuffle_is_a_permutation_that_depends_on_the_names_alone():
    names = [f"file{index}" for index in range(50)]
    order = in_fixed_shuffle(names)
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    assert order == in_fixed_shuffle(names)
