"""Steps run in order, and a result waits no longer than until the next step's layers begin."""

import threading
from collections.abc import Callable, Iterator

import pytest
from bitwatt.model.runner_protocol import StepResult
from bitwatt.model.step_thread import StepThread

TIMEOUT_S = 30


def result_of(token: int) -> StepResult:
    return StepResult([token], [None])


@pytest.fixture
def thread() -> Iterator[StepThread]:
    thread = StepThread()
    yield thread
    thread.close()


def test_results_come_in_order(thread: StepThread) -> None:
    ran: list[int] = []

    def step(i: int) -> Callable[[Callable[[], None]], StepResult]:
        def run(before_layers: Callable[[], None]) -> StepResult:
            before_layers()
            ran.append(i)
            return result_of(i)

        return run

    futures = [thread.submit(step(i)) for i in range(20)]
    assert [future.result(TIMEOUT_S).tokens for future in futures] == [[i] for i in range(20)]
    assert ran == list(range(20))


def test_the_last_result_waits_for_no_other_step(thread: StepThread) -> None:
    assert thread.submit(lambda _: result_of(7)).result(TIMEOUT_S).tokens == [7]


def test_a_result_is_handed_over_when_the_next_step_comes_to_its_layers(
    thread: StepThread,
) -> None:
    has_second, began, goes_on, may_end = (threading.Event() for _ in range(4))

    def first(_before_layers: Callable[[], None]) -> StepResult:
        assert has_second.wait(TIMEOUT_S)
        return result_of(1)

    def second(before_layers: Callable[[], None]) -> StepResult:
        began.set()
        assert goes_on.wait(TIMEOUT_S)
        before_layers()
        assert may_end.wait(TIMEOUT_S)
        return result_of(2)

    earlier, later = thread.submit(first), thread.submit(second)
    has_second.set()
    assert began.wait(TIMEOUT_S)
    assert not earlier.done()
    goes_on.set()
    assert earlier.result(TIMEOUT_S).tokens == [1]
    assert not later.done()
    may_end.set()
    assert later.result(TIMEOUT_S).tokens == [2]


def test_what_a_step_raises_reaches_its_caller_alone(thread: StepThread) -> None:
    def fails(_before_layers: Callable[[], None]) -> StepResult:
        raise ValueError("no such block")

    before, failed, after = (
        thread.submit(run) for run in (lambda _: result_of(1), fails, lambda _: result_of(3))
    )
    assert before.result(TIMEOUT_S).tokens == [1]
    with pytest.raises(ValueError, match="no such block"):
        failed.result(TIMEOUT_S)
    assert after.result(TIMEOUT_S).tokens == [3]


def test_closing_runs_what_was_submitted() -> None:
    thread = StepThread()
    futures = [thread.submit(lambda _, i=i: result_of(i)) for i in range(5)]
    thread.close()
    assert [future.result(0).tokens for future in futures] == [[i] for i in range(5)]
