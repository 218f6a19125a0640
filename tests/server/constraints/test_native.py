"""Native masks are Python's, bit for bit, and a native thread that is stuck is left alone."""

import ctypes
import random
import time
from contextlib import suppress

import pytest
import torch
from bitwatt.constraints import native_lane
from bitwatt.constraints.constraint import Constraint
from bitwatt.constraints.masks import MaskThread
from bitwatt.constraints.native import native_calls
from bitwatt_kernels.cpu.native_backend import NativeBackend

from tests.server.constraints.tokens import allowed, make_grammar, make_native_grammar, token_ids

EOS, STOP = 0, 2
[A] = token_ids("a")
_GRAMMARS = {
    "object": {
        "json": '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, '
        '"lines": {"type": "integer"}, "kind": {"enum": ["a", "bc", "bd"]}}, "required": ["kind"]}'
    },
    "any": {"json_object": True},
    "regex": {"regex": r"[a-f]{2,5}(x|yz)*\d"},
    "choice": {"choice": ["über", "us", "both of us"]},
    "lark": {"grammar": 'start: item ("," item)*\nitem: "(" start ")" | /[0-9]+/'},
    "empty": {"regex": ""},
}


@pytest.fixture(params=[None, 1, 2], ids=["own_thread", "backend_of_1", "backend_of_2"])
def masks(request):
    if request.param is None:
        thread = MaskThread()
    elif native_calls() is None:
        pytest.skip("the native kernels were not built")
    else:
        backend = NativeBackend(torch.device("cpu"), num_threads=request.param)
        thread = MaskThread(backend.mask_lane)
    yield thread
    thread.close()


def started(masks, *constraints):
    masks.ask([(constraint, []) for constraint in constraints])
    masks.settle()
    return dict(enumerate(constraints))


@pytest.mark.parametrize("asked", _GRAMMARS.values(), ids=_GRAMMARS)
def test_native_masks_are_pythons_in_every_state_of_many_walks(masks, asked):
    grammar, native_grammar = make_grammar(**asked), make_native_grammar(**asked)
    chance = random.Random(0)
    settings = [([], 0), ([EOS], 0), ([EOS, STOP], 5), ([A], 2), ([EOS, 10**6], 1000)]
    settings = [chance.choice(settings) for _ in range(50)]
    pythons = [Constraint(grammar, stops, min_tokens=least) for stops, least in settings]
    natives = [Constraint(native_grammar, stops, min_tokens=least) for stops, least in settings]
    constrained = started(masks, *pythons, *natives)
    constrained = {i: constrained[i + len(pythons)] for i in range(len(pythons))}
    for _ in range(12):
        drawn = []
        for python, native in zip(pythons, natives, strict=True):
            assert python.mask == native.mask
            assert (python.failure is None) == (native.failure is None)
            drawn.append(chance.choice(sorted(allowed(native.mask)) or [-1]))
            if drawn[-1] >= 0:
                before = bytes(native.mask)
                with suppress(ValueError):  # a text that is a stop token may leave nothing
                    native.trial().advance([drawn[-1]])
                assert native.mask == before
        masks.ask([(c, [token]) for c, token in zip(pythons, drawn, strict=True) if token >= 0])
        if not masks.start(constrained, torch.tensor(drawn)):
            masks.ask([(c, [t]) for c, t in zip(natives, drawn, strict=True) if t >= 0])
        masks.settle()


def test_a_native_matcher_takes_up_where_tokens_lead_that_were_drawn_before(masks):
    drawn = token_ids("abab")
    constraint = Constraint(make_native_grammar(regex="(ab)*c"), [EOS])
    masks.ask([(constraint, drawn)])
    masks.settle()
    assert allowed(constraint.mask) == {*token_ids("a"), *token_ids("c")}


def test_a_token_that_was_not_drawn_changes_nothing(masks):
    constrained = started(masks, Constraint(make_native_grammar(regex="ab"), [EOS]))
    assert masks.start(constrained, torch.tensor([-1]))
    masks.settle()
    assert allowed(constrained[0].mask) == {A}


def test_a_token_that_the_grammar_lacks_fails_its_row_of_a_step_alone(masks):
    grammar = make_native_grammar(regex="aab")
    constrained = started(masks, Constraint(grammar, [EOS]), Constraint(grammar, [EOS]))
    for _ in range(2):  # a row that has failed is passed over
        assert masks.start(constrained, torch.tensor([STOP, A]))
        masks.settle()
        assert "its grammar can't go on: " in str(constrained[0].failure)
        assert not allowed(constrained[0].mask)
        assert constrained[1].failure is None
        constrained = {0: constrained[0], 1: constrained[1].trial()}


def test_a_native_mask_that_takes_too_long_fails_its_grammar_alone(masks, monkeypatch):
    hostile, other = make_native_grammar(regex="a*"), make_native_grammar(regex="a*")
    constraints = [Constraint(grammar, [EOS]) for grammar in (other, hostile, hostile, other)]
    constrained = started(masks, *constraints)
    slow = constraints[1].matcher.row.matcher
    calls = native_calls()
    compute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    real = compute(calls.compute_mask)
    is_done = []

    @compute
    def slow_for_one(matcher, mask):
        if matcher == slow:
            end = time.thread_time() + 0.15
            while time.thread_time() < end:
                pass
            is_done.append(True)
        return real(matcher, mask)

    address = ctypes.cast(slow_for_one, ctypes.c_void_p)
    patched = type(calls)(calls.commit_token, address)
    monkeypatch.setattr(native_lane, "native_calls", lambda: patched)
    assert masks.start(constrained, torch.tensor([A, A, A, A]))
    masks.settle()
    fine, stuck, same, behind = constraints
    assert stuck.failure == same.failure == hostile.failure
    assert "took more than 50 ms" in str(hostile.failure)
    assert not allowed(stuck.mask) | allowed(same.mask)
    assert allowed(fine.mask) == allowed(behind.mask) == {A, EOS}
    while not is_done:  # the thread that was left ends by itself
        time.sleep(0.01)
    assert masks.start({0: fine, 3: behind}, torch.tensor([A, A, A, A]))
    assert not masks.start(constrained, torch.tensor([A, A, A, A]))  # Python tells the failed
    masks.settle()
    assert other.failure is fine.failure is None
