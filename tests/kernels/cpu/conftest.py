"""The native backend on each instruction set this machine has, and the oracle beside it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt_kernels.cpu.library import instruction_sets
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.reference.reference_backend import ReferenceBackend

CPU = torch.device("cpu")

# test_sanitized.py runs these tests on a build of its own, and says on which instruction sets.
_other_build = os.environ.get("BITWATT_TEST_CPU_LIBRARY")
LIBRARY = Path(_other_build) if _other_build else None
_only = os.environ.get("BITWATT_TEST_CPU_ISAS", "").split()


def available() -> list[str]:
    """Return the instruction sets to test, or why there are none."""
    if _only:
        return _only
    try:
        return instruction_sets(LIBRARY)
    except BackendError as error:
        return [str(error)]


def make_native(**options: Any) -> NativeBackend:
    return NativeBackend(CPU, library=LIBRARY, **options)


@pytest.fixture(scope="session")
def reference() -> ReferenceBackend:
    return ReferenceBackend(CPU)


@pytest.fixture(scope="session", params=available())
def native(request: pytest.FixtureRequest) -> NativeBackend:
    return make_native(instruction_set=request.param, num_threads=2)
