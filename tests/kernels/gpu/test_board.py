"""What stands beside the figures: the board as NVML tells it, whole or in part."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.cublas import best_way, ways
from bench.machine import Board, gpu_rates, measure_rates
from bitwatt_kernels.gpu.timing import Call, HostTimer, Timing
from bitwatt_kernels.roofline import linear


class NVMLError(Exception):
    pass


def unsupported(*_: Any) -> float:
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU="gpu",
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, kind: {"sm": 1980, "memory": 2619}[kind],
        nvmlDeviceGetPowerUsage=lambda handle: 412_500,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 7_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="0a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_what_the_board_does_meanwhile_is_told_by_medians_and_any_throttling(
    nvml: SimpleNamespace,
) -> None:
    board = Board(torch.device("cuda"))
    seen: list[int] = []

    def reasons(handle: object) -> int:
        seen.append(4 if len(seen) == 1 else 32 if len(seen) == 2 else 0)
        return seen[-1]

    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = reasons
    with board.watch(period_s=0.001) as state:
        while len(seen) < 5:
            time.sleep(0.001)
    assert state["throttle_bits"] == 36
    assert state["sm_mhz"] == 1980
    assert state["memory_mhz"] == 2619
    assert state["watts"] == 412.5
    assert state["celsius"] == 61
    assert board.joules() == 7


def test_a_board_that_tells_little_loses_no_row(nvml: SimpleNamespace) -> None:
    nvml.nvmlDeviceGetPowerUsage = unsupported
    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    del nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    board = Board(torch.device("cuda"))
    assert board.joules() is None
    assert board.now() == {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 61}
    with board.watch() as state:
        pass
    assert state["sm_mhz"] == 1980
    assert "watts" not in state


def test_without_a_gpu_there_is_no_board() -> None:
    board = Board(torch.device("cpu"))
    assert board.unavailable == "no GPU"
    with board.watch() as state:
        assert state == board.now() == {}


def test_a_rate_that_cannot_be_measured_takes_no_other_along_and_sets_no_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise RuntimeError("not implemented on this card")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    figures, failed = measure_rates(torch.device("cpu"), HostTimer(), 16)
    assert failed.keys() == {"int8_ops_s"}
    assert "not implemented on this card" in failed["int8_ops_s"]
    assert {"bandwidth_bytes_s", "bf16_ops_s", "kernel_s"} < figures.keys()
    op = linear("", 1, 64, 64, "ternary")
    rates = gpu_rates(figures)
    assert op.floor_s(rates) == pytest.approx(
        (op.weight_bytes + op.other_bytes) / rates.bandwidth_bytes_s + rates.kernel_s
    )


class ByName(HostTimer):
    """Times a way by what it is called."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = iter(seconds.values())

    def measure(self, calls: Any, *, budget_s: float = 0.15) -> Timing:
        call: Call
        for call in calls:
            call()
        return Timing.of([next(self._seconds)])


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_fastest_way_is_found_and_every_way_gives_the_product(num_tokens: int) -> None:
    x, weight = torch.randn(num_tokens, 8), torch.randn(4, 8)
    for way in ways(num_tokens, x.device).values():
        torch.testing.assert_close(way(x, weight), x @ weight.T)
        assert way(x, weight).is_contiguous()
    names = list(ways(num_tokens, x.device))
    timer = ByName(dict(zip(names, (2.0, 1.0), strict=True)))
    name, timing = best_way(x, [weight], timer, budget_s=0.1)
    assert (name, timing.median_s) == (names[1], 1.0)
