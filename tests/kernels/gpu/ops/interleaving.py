"""Triton's interpreter with programs that run at once: a seeded one goes on after every atomic.

The interpreter runs a grid's programs one after the other, so that the last program is always the
last to arrive. Here each has a thread, and only the one that has the baton runs.
"""

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

from triton.runtime import interpreter

__all__ = ["interleaved"]

Program = Callable[[], None]


class _Baton:
    """Passes control among threads at random, by a seed."""

    def __init__(self, seed: int) -> None:
        self.num_switches = 0
        self._random = random.Random(seed)
        self._has_passed = threading.Condition()
        self._alive: list[int] = []
        self._holder: int | None = None
        self._errors: list[BaseException] = []

    def run(self, programs: list[Program]) -> None:
        threads = [
            threading.Thread(target=self._live, args=(i, program))
            for i, program in enumerate(programs)
        ]
        self._alive = list(range(len(programs)))
        self._holder = self._random.choice(self._alive)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def switch(self) -> None:
        """Let any program go on, and return when it is the caller's turn again."""
        with self._has_passed:
            me = self._holder
            self.num_switches += 1
            self._holder = self._random.choice(self._alive)
            self._has_passed.notify_all()
            self._has_passed.wait_for(lambda: self._holder == me)
        if self._errors:  # whoever waits for the program that has failed would wait for ever
            raise self._errors[0]

    def _live(self, i: int, program: Program) -> None:
        with self._has_passed:
            self._has_passed.wait_for(lambda: self._holder == i)
        try:
            program()
        except BaseException as error:
            self._errors.append(error)
        with self._has_passed:
            self._alive.remove(i)
            self._holder = self._random.choice(self._alive) if self._alive else None
            self._has_passed.notify_all()


@contextmanager
def interleaved(seed: int) -> Iterator[_Baton]:
    """Run kernels launched inside with their programs interleaved in a random order."""
    baton = _Baton(seed)
    builder: Any = interpreter.interpreter_builder
    plain_atomic = interpreter.InterpreterBuilder.create_atomic_rmw

    def switch() -> None:
        index = builder.grid_idx
        baton.switch()
        builder.grid_idx = index

    def atomic(self: Any, *arguments: Any) -> Any:
        switch()
        result = plain_atomic(self, *arguments)
        switch()
        return result

    def launch(self: Any, *arguments: Any, **keywords: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        keywords = {name: value for name, value in keywords.items() if name in names}
        hosted, hosted_keywords = self._init_args_hst(arguments, keywords)
        scope = interpreter._patch_lang(self.fn)
        try:
            given = inspect.getcallargs(self.fn, *hosted, **hosted_keywords)
            given = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            grid = (*self.grid, 1, 1, 1)[:3]
            builder.set_grid_dim(*grid)

            def program(index: tuple[int, ...]) -> Program:
                def run() -> None:
                    builder.set_grid_idx(*index)
                    self.fn(**given)

                return run

            baton.run([program(index) for index in product(*map(range, grid))])
        finally:
            scope.restore()
        self._restore_args_dev(arguments, hosted, keywords, hosted_keywords)

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", atomic),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield baton
