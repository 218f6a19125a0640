"""The device's meter alone: it is told of steps and intervals, and returns splits."""

from dataclasses import dataclass

from bitwatt.telemetry.energy.attribution import Interval, StepWork
from bitwatt.telemetry.energy.device_meter import DeviceMeter


@dataclass
class Counter:
    """The counter's name; the meter reads nothing."""

    source: str = "rapl"


def step(start_s, end_s, model="m"):
    return StepWork(model=model, start_s=start_s, end_s=end_s, prefill={}, decode=["a"])


def test_an_interval_is_split_once_every_model_has_told_of_its_steps():
    meter = DeviceMeter(Counter(), clock=lambda: 2.0)
    meter.add_model("m")
    meter.add_model("n")
    meter.add_interval(Interval(0, 1, 10.0))
    meter.add_step("m", step(0, 1), 1.0)
    assert meter.settle() == []
    meter.add_step("n", None, 1.5)
    [split] = meter.settle()
    assert (split.decode, split.total) == ({"m": 10}, 10)
    assert meter.settle() == []
    assert meter.source == "rapl"


def test_nobody_is_waited_for_who_has_left_or_is_silent_for_a_minute():
    now_s = 0.0
    meter = DeviceMeter(Counter(), clock=lambda: now_s)
    meter.add_model("m")
    meter.add_interval(Interval(0, 1, 10.0))
    assert meter.settle() == []
    now_s = 61.0
    [split] = meter.settle()
    assert (split.unattributed, split.idle) == (10, 0)
    meter.add_interval(Interval(1, 2, 10.0))
    now_s = 3.0
    assert meter.settle() == []
    meter.remove_model("m")
    [split] = meter.settle()
    assert split.idle == 10
