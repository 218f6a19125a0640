"""Meters the served models: devices' counters on one side, engines' steps on the other.

It runs in the API process. A counter is a device's, and one device may serve several engines:
only here do all of their steps come together. The engines report what each step computed with
the step's outputs, in monotonic time, which processes of one machine share.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from bitwatt.engine.messages import EngineInfo, StepOutputs
from bitwatt.telemetry.energy.attribution import Attributor, Interval, Split, StepWork
from bitwatt.telemetry.energy.counter import (
    DeviceState,
    EnergyChoice,
    EnergyCounter,
    Unavailable,
)
from bitwatt.telemetry.energy.polling import CounterPoller
from bitwatt.telemetry.energy.sources import open_counter
from bitwatt.telemetry.metrics import Metrics, ModelMetrics

__all__ = ["EnergyMeters", "ModelEnergy", "RequestEnergy", "step_listener", "total_energy"]

logger = logging.getLogger(__name__)

_MAX_LAG_S = 60.0
_LOADING = Unavailable("loading", "the engine has not said yet which device it runs on")
_STOPPED = Unavailable("stopped", "the server is stopping")
_UNMETERED = Unavailable("off", "energy is not metered")
_NO_RECENT_INTERVAL = "the counter has told nothing of these moments, yet or any more"

OpenCounter = Callable[[EnergyChoice, str, str | None], EnergyCounter | Unavailable]


class RequestEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took of the device's measured energy.

    energy_joules   gross, idle power of busy moments included; None where it was not measured
    energy_extrapolated_joules  the part of it, at its end, that no counter edge covered yet: its
                                last steps at the power measured just before
    attribution     "proportional": its weighted share of the tokens of each step;
                    "proportional_shared": and its engine shares the device with another
    reason          why there is no figure
    """

    energy_joules: float | None = None
    energy_extrapolated_joules: float | None = None
    energy_source: str | None = None
    attribution: str | None = None
    reason: str | None = None


class EnergyMeters:
    """The meters of one API process. Used from one event loop."""

    def __init__(
        self,
        choice: EnergyChoice = "auto",
        metrics: Metrics | None = None,
        *,
        open_counter: OpenCounter = open_counter,
    ) -> None:
        """Prepare; nothing is read before an engine is bound to its device."""
        self._choice: EnergyChoice = choice
        self._metrics = metrics
        self._open_counter = open_counter
        self._devices: dict[tuple[str, str | None], _DeviceMeter | Unavailable] = {}

    def model(self, name: str, metrics: ModelMetrics) -> "ModelEnergy":
        """Return one served model's energy, to be bound when its engine is ready."""
        return ModelEnergy(name, meters=self, metrics=metrics)

    def device_of(self, info: EngineInfo) -> "_DeviceMeter | Unavailable":
        """Return the meter of an engine's device, the same for the same device."""
        key = info.device, info.device_uuid
        if key not in self._devices:
            counter = self._open_counter(self._choice, *key)
            if isinstance(counter, Unavailable):
                self._devices[key] = counter
            else:
                self._devices[key] = _DeviceMeter(counter, self._metrics)
        return self._devices[key]


class ModelEnergy:
    """One served model's energy, and its open requests'. Used from the event loop."""

    def __init__(
        self,
        name: str = "",
        *,
        meters: EnergyMeters | None = None,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """Without meters, nothing is measured and every figure says so."""
        self.name = name
        self.metrics = metrics
        self.unavailable: Unavailable | None = _UNMETERED if meters is None else _LOADING
        self.watermark_s = float("-inf")  # all steps that began earlier are known
        self._meters = meters
        self._device: _DeviceMeter | None = None
        self._num_steps = 0
        self._joules: dict[str, float] = {}  # of open requests, settled
        self.busy_joules = 0.0  # of all its steps, settled

    @property
    def source(self) -> str | None:
        """What measures: "nvml", "rapl", or None."""
        return None if self._device is None else self._device.counter.source

    @property
    def attribution(self) -> str:
        """How a request's share is found."""
        is_shared = self._device is not None and len(self._device.models) > 1
        return "proportional_shared" if is_shared else "proportional"

    def bind(self, info: EngineInfo) -> None:
        """Start measuring the engine's device; called when the engine is ready first."""
        if self._meters is None or self._device is not None:
            return
        device = self._meters.device_of(info)
        if isinstance(device, Unavailable):
            self.unavailable = device
            logger.warning("%s: energy is not measured: %s", self.name, device.detail)
        else:
            self.unavailable = None
            self._device = device
            device.add(self)
            logger.info("%s: energy is %s's, of %s", self.name, self.source, device.counter.device)
        if self.metrics is not None:
            reason = "" if self.unavailable is None else self.unavailable.reason
            self.metrics.describe_energy(self.source, reason)

    def unbind(self) -> None:
        """Stop measuring; the figures stay."""
        device, self._device = self._device, None
        if device is not None:
            self.unavailable = _STOPPED
            device.remove(self)

    def on_step(self, message: StepOutputs) -> None:
        """Take in what a step computed, or a heartbeat."""
        if self._device is None:
            return
        stats = message.stats
        if stats.num_steps != self._num_steps:
            self._num_steps = stats.num_steps
            prefill = stats.step_prefill
            decode = [
                output.request_id
                for output in message.outputs
                if output.token_ids and output.request_id not in prefill
            ]
            num_lost = stats.step_tokens - sum(prefill.values()) - len(decode)
            self._device.attributor.add_step(
                StepWork(
                    model=self.name,
                    start_s=stats.step_ended_s - stats.step_s,
                    end_s=stats.step_ended_s,
                    prefill=prefill,
                    decode=decode,
                    num_lost=max(num_lost, 0),
                )
            )
        is_idle = not stats.num_running and not stats.num_waiting
        self.watermark_s = stats.time_s if is_idle else stats.step_ended_s
        self._device.settle()

    def open(self, request_id: str) -> None:
        """Begin to keep a request's joules; every open is followed by a close."""
        if self._device is not None:
            self._joules[request_id] = 0.0

    def close(self, request_id: str) -> RequestEnergy:
        """Return what the request took, at its end or where it was given up."""
        settled = self._joules.pop(request_id, None)
        if self._device is None or settled is None:
            reason = (self.unavailable or _LOADING).detail
            return RequestEnergy(reason=reason)
        unsettled = self._device.attributor.unsettled_joules(request_id)
        if unsettled is None:
            return RequestEnergy(reason=_NO_RECENT_INTERVAL)
        return RequestEnergy(
            energy_joules=settled + unsettled,
            energy_extrapolated_joules=unsettled,
            energy_source=self.source,
            attribution=self.attribution,
        )

    def add(self, split: Split, *, num_sharing: int) -> None:
        """Take in this model's part of an interval; waiting time is shared evenly."""
        for request_id in self._joules.keys() & split.by_request.keys():
            self._joules[request_id] += split.by_request[request_id]
        if self.metrics is None or self.source is None:
            return
        phases = {
            "prefill": split.prefill.get(self.name, 0.0),
            "decode": split.decode.get(self.name, 0.0),
            "idle": split.idle / num_sharing,
            "unattributed": split.unattributed / num_sharing,
        }
        self.busy_joules += phases["prefill"] + phases["decode"]
        for phase, joules in phases.items():
            self.metrics.add_energy(self.source, self.attribution, phase, joules)


class _DeviceMeter:
    """A counter, the engines whose device it measures, and the intervals not split yet."""

    def __init__(self, counter: EnergyCounter, metrics: Metrics | None) -> None:
        loop = asyncio.get_running_loop()
        self.counter = counter
        self.attributor = Attributor()
        self.models: list[ModelEnergy] = []
        self._metrics = metrics
        self._intervals: deque[Interval] = deque()

        def on_interval(interval: Interval) -> None:
            loop.call_soon_threadsafe(self.on_interval, interval)

        def on_state(state: DeviceState) -> None:
            loop.call_soon_threadsafe(self._on_state, state)

        self._poller = CounterPoller(counter, on_interval, on_state)
        self._poller.start()

    def add(self, model: ModelEnergy) -> None:
        self.models.append(model)

    def remove(self, model: ModelEnergy) -> None:
        self.models.remove(model)
        if not self.models:
            self._poller.stop()

    def on_interval(self, interval: Interval) -> None:
        self._intervals.append(interval)
        self.settle()

    def settle(self) -> None:
        """Split the intervals whose steps are all known."""
        while self._intervals:
            interval = self._intervals[0]
            is_known = all(model.watermark_s >= interval.end_s for model in self.models)
            if not is_known and time.monotonic() - interval.end_s < _MAX_LAG_S:
                return
            self._intervals.popleft()
            split = self.attributor.split(interval, is_up=is_known)
            for model in self.models:
                model.add(split, num_sharing=len(self.models))
                if model.metrics is not None and self.attributor.idle_watts is not None:
                    model.metrics.set_idle_power(self.counter.source, self.attributor.idle_watts)

    def _on_state(self, state: DeviceState) -> None:
        if self._metrics is not None:
            self._metrics.on_device(state)


def total_energy(parts: Sequence[RequestEnergy]) -> RequestEnergy:
    """Return the energy of several choices together; no figure where one of them has none."""
    without = next((part for part in parts if part.energy_joules is None), None)
    if without is not None or not parts:
        return without or RequestEnergy(reason="nothing ran")
    return RequestEnergy(
        energy_joules=sum(part.energy_joules or 0.0 for part in parts),
        energy_extrapolated_joules=sum(part.energy_extrapolated_joules or 0.0 for part in parts),
        energy_source=parts[0].energy_source,
        attribution=parts[0].attribution,
    )


def step_listener(metrics: ModelMetrics, energy: ModelEnergy) -> Callable[[StepOutputs], None]:
    """Return what an EngineClient calls after every step and heartbeat."""

    def on_step(message: StepOutputs) -> None:
        metrics.on_stats(message.stats)
        energy.on_step(message)

    return on_step
