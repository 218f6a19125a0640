"""Compiles what a call would launch, in as many threads as there are cores.

Triton compiles a kernel where it is first launched, one after the other; its passes and ptxas hold
no lock of Python's. So the call is made once with nothing compiled or launched, to see what it asks
for. The kernels are then in Triton's cache, where the call finds them when it is made in earnest.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

__all__ = ["compile_together"]

MAX_THREADS = 16


def compile_together(
    call: Callable[[], object], begin_thread: Callable[[], object] | None = None
) -> int:
    """Compile in parallel what call would launch and isn't compiled; return how many kernels.

    call          is run, its launches do nothing. Whatever can't be compiled is passed over: it
                  raises where it is launched
    begin_thread  makes the call's device the current one of a thread
    """
    asked: dict[tuple[str, str], Any] = {}

    def note(*, fn: Any, **asked_for: Any) -> bool:
        data = asked_for["compile"]["specialization_data"]
        asked.setdefault((fn.name, data), fn.jit_function)
        return True  # neither to be compiled nor launched

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        call()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, "compiling", begin_thread) as pool:
        futures = [pool.submit(kernel.preload, data) for (_, data), kernel in asked.items()]
    return sum(future.exception() is None for future in futures)
