"""Masks: the tokens that a grammar allows, where it may end, and what becomes of a slow one."""

import time

import pytest
from bitwatt.constraints.constraint import Constraint
from bitwatt.constraints.masks import MaskThread

from tests.server.constraints import tokens
from tests.server.constraints.tokens import VOCAB_SIZE, allowed, token_ids

EOS, STOP = 0, 2
[A] = token_ids("a")


@pytest.fixture(params=[tokens.make_grammar, tokens.make_native_grammar], ids=["python", "native"])
def make_grammar(request):
    return request.param


@pytest.fixture
def masks():
    thread = MaskThread()
    yield thread
    thread.close()


def test_a_stop_token_is_allowed_where_the_grammar_may_end_and_nowhere_else(make_grammar):
    constraint = Constraint(make_grammar(regex="aa?"), [EOS, STOP])
    assert allowed(constraint.advance([])) == {A}
    assert allowed(constraint.advance([A])) == {A, EOS, STOP}
    assert allowed(constraint.advance([A])) == {EOS, STOP}


def test_a_stop_token_that_is_text_ends_only_what_may_end(make_grammar):
    constraint = Constraint(make_grammar(regex="aaa"), [A])
    with pytest.raises(ValueError, match="allows none of the model's tokens"):
        constraint.advance([])


def test_an_ended_grammar_without_a_stop_token_goes_on_with_the_models_own_end(make_grammar):
    constraint = Constraint(make_grammar(regex="aa?"), [])
    assert allowed(constraint.advance([A])) == {A}
    assert allowed(constraint.advance([A])) == {EOS}
    assert allowed(constraint.advance([EOS])) == {EOS}


def test_an_empty_grammar_without_a_stop_token_goes_on_with_the_models_own_end(make_grammar):
    constraint = Constraint(make_grammar(regex=""), [])
    assert allowed(constraint.advance([])) == {EOS}
    assert allowed(constraint.advance([EOS])) == {EOS}


def test_before_min_tokens_only_a_grammar_that_has_to_ends(make_grammar):
    constraint = Constraint(make_grammar(regex="aa?a?"), [EOS], min_tokens=2)
    assert allowed(constraint.advance([A])) == {A}
    assert allowed(constraint.advance([A])) == {A, EOS}
    constraint = Constraint(make_grammar(regex="a"), [EOS], min_tokens=3)
    assert allowed(constraint.advance([A])) == {EOS}


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 5, VOCAB_SIZE, VOCAB_SIZE + 40])
def test_a_mask_has_a_bit_for_each_row_of_the_models_head(vocab_size, make_grammar):
    constraint = Constraint(make_grammar(vocab_size, regex="a.*"), [EOS, 10**6])
    mask = constraint.advance([])
    assert len(mask) % 4 == 0
    assert 8 * len(mask) >= vocab_size
    assert allowed(constraint.advance([A])) <= set(range(min(vocab_size, VOCAB_SIZE)))


def test_matchers_of_one_grammar_know_nothing_of_one_another(masks, make_grammar):
    grammar = make_grammar(choice=["ab", "ba"])
    first, second = Constraint(grammar, [EOS]), Constraint(grammar, [EOS])
    [b] = token_ids("b")
    masks.ask([(first, [A]), (second, [b])])
    masks.settle()
    assert allowed(first.mask) == {b}
    assert allowed(second.mask) == {A}


def test_a_token_that_the_grammar_lacks_fails_its_request_alone(masks, make_grammar):
    first = Constraint(make_grammar(regex="a"), [EOS])
    second = Constraint(make_grammar(regex="b"), [EOS])
    masks.ask([(first, [STOP]), (second, [])])
    masks.settle()
    assert first.failure is not None
    assert not allowed(first.mask)
    assert second.failure is None
    assert allowed(second.mask) == set(token_ids("b"))


class Slow(Constraint):
    spent_s = 0.3  # of processor time

    def advance(self, token_ids):
        end = time.thread_time() + self.spent_s
        while time.thread_time() < end:
            pass
        return super().advance(token_ids)


def test_a_mask_that_takes_too_long_fails_its_grammar_alone(masks, make_grammar):
    hostile, other = make_grammar(regex="a"), make_grammar(regex="a")
    slow, same, fine = Slow(hostile, [EOS]), Constraint(hostile, [EOS]), Constraint(other, [EOS])
    masks.ask([(slow, []), (same, []), (fine, [])])
    masks.settle()
    assert slow.failure == same.failure == hostile.failure
    assert "took more than 50 ms" in str(hostile.failure)
    assert allowed(fine.mask) == {A}
    time.sleep(0.5)  # what the thread that was left finds is nobody's
    assert not allowed(slow.mask)


def test_the_limit_is_of_each_mask_and_not_of_all_that_a_request_took(masks, make_grammar):
    slow = Slow(make_grammar(regex="a*"), [EOS])
    slow.spent_s = 0.03
    for _ in range(4):
        masks.ask([(slow, [A])])
        masks.settle()
    assert slow.failure is None
    assert allowed(slow.mask) == {A, EOS}


def test_nothing_asked_is_nothing_to_wait_for(masks):
    masks.settle()
    masks.ask([])
    masks.settle()
