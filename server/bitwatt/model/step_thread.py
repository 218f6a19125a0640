"""Runs a CPU's steps one after the other in a thread of its own.

A step's result is handed over when the next step, if one waits, has come to its layers: a long
call without the interpreter's lock. Handed over at once it would wake the engine's thread to half a
millisecond of Python, which the next step's own first lines would wait for, the cores idle.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from bitwatt.model.runner_protocol import StepResult

__all__ = ["StepThread"]

# Takes what to call when the step's layers begin; returns the step's result.
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
    """A step that is done, or none."""

    def __init__(
        self,
        future: Future[StepResult] | None = None,
        result: StepResult | BaseException | None = None,
    ) -> None:
        self._future = future
        self._result = result

    def hand_over(self) -> None:
        """Tell whoever waits; the second time, nothing."""
        future, self._future = self._future, None
        if future is None:
            return
        if isinstance(self._result, StepResult):
            future.set_result(self._result)
        else:
            future.set_exception(self._result)
