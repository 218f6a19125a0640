"""Fixtures of the tests that run the kernels: in Triton's interpreter, or on a GPU.

TRITON_INTERPRET=1 is read when kernels are defined and must not reach the tests that compile
them. So the tests here are left out of an ordinary run; tests/kernels/gpu/test_interpreted.py
runs them in a process of their own, and `make gpu` on the GPU.
"""

from dataclasses import replace

import pytest
import torch
import triton
from triton.runtime.interpreter import interpreter_builder

INTERPRETED = triton.knobs.runtime.interpret
# A fifth of the time went to computing each sum and product of integers again, in 64 bits, for a
# comparison that the interpreter drops: it asserts on a device only where `debug` is set.
assert not interpreter_builder.options.debug
interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if "kernels/gpu/ops" in item.path.as_posix():
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
