"""A program that times the same arithmetic on one processor again and again, until it is ended.

Half of it is a loop of the interpreter, as a server's own work is, and half a product of matrices,
as a step's is. Its time is the thread's: other programs on the processor are not in it, neighbours
on the same core are.
"""

import os
import sys
import time

import numpy as np

from bitwatt.simulation.pace import RECORD

_PERIOD_S = 0.03
_ADDITIONS = 1200  # about as long as the product takes
_SIZE = 96


def main(cpu: int, parent: int) -> None:
    """Write a record a sample to the standard output until this parent is gone."""
    os.sched_setaffinity(0, {cpu})
    left = np.random.default_rng(0).random((_SIZE, _SIZE), dtype=np.float32)
    right, product = left.copy(), np.empty_like(left)
    while os.getppid() == parent:
        now_s = time.perf_counter()
        began_ns = time.thread_time_ns()
        total = 0
        for i in range(_ADDITIONS):
            total += i
        np.matmul(left, right, out=product)
        seconds = 1e-9 * (time.thread_time_ns() - began_ns)
        os.write(sys.stdout.fileno(), RECORD.pack(now_s, seconds))
        time.sleep(max(0.0, now_s + _PERIOD_S - time.perf_counter()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
