"""Runs a CPU's steps one after the other in a thread of its own.

A step's result is delivered late on purpose. Delivering it wakes the engine's thread, which then
runs half a millisecond of Python and so holds the GIL. If the next step is already queued, its own
Python, up to its layers, would wait for that with the cores idle. So the next step goes first, and
the result is delivered when that step has reached its layers: one long call that releases the GIL.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from bitwatt.model.runner_protocol import StepResult

__all__ = ["StepThread"]

# A step. Its argument is to be called when the step's layers begin; returns the step's result.
Run = Callable[[Callable[[], None]], StepResult]


class StepThread:
    """Results come in the order of submission. Close it once, from the thread that submits."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Run, Future[StepResult]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    def submit(self, run: Run) -> Future[StepResult]:
        """Return the result of run, to be called behind those submitted before."""
        future: Future[StepResult] = Future()
        self._queue.put((run, future))
        return future

    def close(self) -> None:
        """Wait for what was submitted, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        done = _Done()
        while True:
            if self._queue.empty():
                done.hand_over()
            submitted = self._queue.get()
            if submitted is None:
                done.hand_over()
                return
            run, future = submitted
            result: StepResult | BaseException
            try:
                result = run(done.hand_over)
            except BaseException as error:  # it is the caller's
                result = error
            done.hand_over()
            done = _Done(future, result)


class _Done:
    """A step that is done and whose result nobody has yet; or none."""

    def __init__(
        self,
        future: Future[StepResult] | None = None,
        result: StepResult | BaseException | None = None,
    ) -> None:
        self._future = future
        self._result = result

    def hand_over(self) -> None:
        """Deliver the result, once: the second call does nothing."""
        future, self._future = self._future, None
        if future is None:
            return
        if isinstance(self._result, StepResult):
            future.set_result(self._result)
        else:
            future.set_exception(self._result)
