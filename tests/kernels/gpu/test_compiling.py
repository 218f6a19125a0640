"""Kernels are compiled before they are launched, with a driver that does nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from bitwatt_kernels.gpu.compiling import compile_together
from triton.backends.compiler import GPUTarget


@triton.jit
def fill_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1)
    tl.store(x_ptr, 1.0)


class Driver:
    """Stands for a card and its driver."""

    def __init__(self) -> None:
        self.num_launches = 0
        self.utils = self

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return (1, 1, 32, 0, 1024)

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, *_: Any) -> Any:
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.num_launches += 1


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return fake


def test_each_kernel_is_compiled_once_and_launched_only_in_earnest(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **given: compiled.append(given["cache_hit"])
    )
    x = torch.zeros(64)

    def call() -> None:
        for block in (16, 32, 16, 64):
            fill_kernel[(1,)](x, BLOCK=block)

    begun: list[None] = []
    assert compile_together(call, lambda: begun.append(None)) == 3
    assert begun
    assert driver.num_launches == 0
    assert compiled == [False] * 3
    call()
    assert driver.num_launches == 4
    assert len(compiled) == 3
    assert compile_together(call) == 0


def test_what_cannot_be_compiled_raises_where_it_is_launched(driver: Driver) -> None:
    def call() -> None:
        broken_kernel[(1,)](torch.zeros(1), BLOCK=2)

    assert compile_together(call) == 0
    with pytest.raises(triton.CompilationError, match="static_assert"):
        call()
    assert driver.num_launches == 0
