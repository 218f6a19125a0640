"""The native backend on each instruction set this machine has, and the oracle beside it."""

import pytest
import torch
from bitwatt_kernels.cpu.library import instruction_sets
from bitwatt_kernels.cpu.native import NativeBackend
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.reference import ReferenceBackend

CPU = torch.device("cpu")


def available() -> list[str]:
    try:
        return instruction_sets()
    except BackendError as error:
        return [str(error)]


@pytest.fixture(scope="session")
def reference() -> ReferenceBackend:
    return ReferenceBackend(CPU)


@pytest.fixture(scope="session", params=available())
def native(request: pytest.FixtureRequest) -> NativeBackend:
    return NativeBackend(CPU, instruction_set=request.param, num_threads=2)
