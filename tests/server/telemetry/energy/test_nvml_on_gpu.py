"""The driver's counter on a real board."""

import time

import pytest
import torch
from bitwatt.telemetry.energy.nvml import NvmlCounter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_the_boards_joules_agree_with_its_watts():
    pytest.importorskip("pynvml")
    counter = NvmlCounter.open(str(torch.cuda.get_device_properties(0).uuid))
    assert isinstance(counter, NvmlCounter), counter
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    watts = []

    def work(seconds):
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            for _ in range(20):
                x @ x
            torch.cuda.synchronize()
            watts.append(counter.state().power_w)

    work(2.0)
    watts.clear()
    joules, began_s = counter.read_joules(), time.monotonic()
    work(3.0)
    joules, seconds = counter.read_joules() - joules, time.monotonic() - began_s
    counter.close()
    known = [power for power in watts if power is not None]
    assert joules > 0
    if known:
        # The counter's cadence of 0.1 s is 3% of the interval; the rest is between two samples.
        assert joules / seconds == pytest.approx(sum(known) / len(known), rel=0.2)
