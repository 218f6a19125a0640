"""Hostile grammars are refused by name and limit, and the next one is tried all the same."""

import asyncio

import pytest
from bitwatt import StructuredOutputsParams
from bitwatt.constraints import checker
from bitwatt.constraints.checker import CHECK_TIME_LIMIT_S, GrammarChecker
from bitwatt.errors import InvalidRequestError

from tests.server.constraints.tokens import VOCABULARY

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PRIME = 999_983


DOUBLED = "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30))

HOSTILE = {
    "takes 20 s": {"json": {"type": "integer", "multipleOf": PRIME}},
    "deep JSON": {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "deep GBNF": {"grammar": f"root ::= {'(' * 8000}" + '"a"' + ")" * 8000},
    "doubled terminals": {"grammar": f'start: A0\n{DOUBLED}\nA30: "x"\n'},
    "optional characters": {"regex": ".?" * 1024},
    "a long pattern": {"json": {"type": "string", "pattern": "a?" * 15_000}},
    "intersections": {"json": {"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(9, 30)]}},
}


@pytest.fixture
async def grammars():
    checker = GrammarChecker(VOCABULARY.for_grammars)
    yield checker
    await checker.close()


def source(**asked):
    return StructuredOutputsParams(**asked).source()


async def test_a_grammar_is_tried_once_and_its_verdict_kept(grammars):
    text = await grammars.check(source(choice=["yes", "no"]))
    assert '"yes" | "no"' in text.replace("\\", "")
    process = grammars._process
    grammars._process = None  # nobody is asked again
    assert await grammars.check(source(choice=["yes", "no"])) == text
    grammars._process = process


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_is_refused_with_its_field_and_the_next_is_tried(grammars, name):
    hostile = source(**HOSTILE[name])
    with pytest.raises(InvalidRequestError, match="can't be followed: ") as raised:
        await grammars.check(hostile)
    assert raised.value.param == hostile.param
    assert await grammars.check(source(regex="a"))
    with pytest.raises(InvalidRequestError, match="can't be followed: "):
        await grammars.check(hostile)


async def test_one_that_takes_too_long_is_told_the_limit_and_its_process_ended(grammars):
    await grammars.check(source(regex="a"))
    process = grammars._process
    with pytest.raises(InvalidRequestError, match=f"more than {CHECK_TIME_LIMIT_S} s to compile"):
        await grammars.check(source(**HOSTILE["takes 20 s"]))
    assert process.returncode is not None
    assert grammars._process is None


async def test_a_process_that_dies_of_a_grammar_is_told_as_the_limit(grammars, monkeypatch):
    async def die(process, data):
        raise asyncio.IncompleteReadError(b"", 4)

    await grammars.check(source(regex="a"))
    monkeypatch.setattr(checker, "_exchange", die)
    with pytest.raises(InvalidRequestError, match="more than 512 MiB or is too deep"):
        await grammars.check(source(regex="b"))
    monkeypatch.undo()
    assert await grammars.check(source(regex="c"))


async def test_a_caller_that_goes_away_leaves_no_answer_for_the_next(grammars):
    await grammars.check(source(regex="a"))
    task = asyncio.create_task(grammars.check(source(**HOSTILE["takes 20 s"])))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "start: /b/" in await grammars.check(source(regex="b"))


async def test_verdicts_are_kept_within_their_bounds(grammars, monkeypatch):
    monkeypatch.setattr(checker, "MAX_KEPT", 3)
    for letter in "abcde":
        await grammars.check(source(regex=letter))
    assert [kept.text for kept in grammars._kept] == ["c", "d", "e"]
    monkeypatch.setattr(checker, "MAX_KEPT_CHARS", 200)
    await grammars.check(source(regex="f" * 60))
    assert [kept.text[0] for kept in grammars._kept] == ["f"]
