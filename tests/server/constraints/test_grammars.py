"""Compiled grammars are kept within their bounds, and compiled again when they were let go."""

import pytest
from bitwatt.constraints import grammars as module
from bitwatt.constraints.constraint import Constraint
from bitwatt.constraints.grammars import Grammars

from tests.server.constraints.tokens import VOCAB_SIZE, VOCABULARY, allowed, token_ids, written


@pytest.fixture
def grammars():
    grammars = Grammars(VOCAB_SIZE, [0])
    grammars.learn(VOCABULARY.for_grammars())
    yield grammars
    grammars.close()


def test_a_grammar_is_compiled_once(grammars):
    first = grammars.compile(written(regex="a")).result()
    assert grammars.compile(written(regex="a")).result() is first


def test_what_cant_be_compiled_is_told_each_time(grammars):
    for _ in range(2):
        with pytest.raises(ValueError, match="unclosed group"):
            grammars.compile(written(regex="a").replace("/a/", "/(a/")).result()


def test_a_grammar_with_a_zero_character_is_not_cut_there(grammars):
    grammar = grammars.compile(written(regex="a\0b")).result()
    constraint = Constraint(grammar, [0])
    assert allowed(constraint.advance(token_ids("a"))) == set(token_ids("\0"))


def test_those_used_last_are_kept_within_count_and_size(grammars, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    a, b, c = (written(regex=letter) for letter in "abc")
    kept = grammars.compile(a).result()
    grammars.compile(b)
    assert grammars.compile(a).result() is kept
    grammars.compile(c)  # b was used before a
    assert grammars.compile(a).result() is kept
    monkeypatch.setattr(module, "MAX_KEPT_CHARS", 10)
    grammars.compile(b)
    assert grammars.compile(a).result() is not kept
