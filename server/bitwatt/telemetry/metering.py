"""Joins devices' counters with engines' steps, keeps the ledger, and tells the metrics.

It runs in the API process. A counter is a device's, and several engines may share the device, so
their steps have to come together in one place: here. Engines report what each step computed along
with its outputs, in monotonic seconds, which the processes of one machine share.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from bitwatt.engine.messages import EngineInfo, StepOutputs
from bitwatt.telemetry.energy.attribution import Interval, StepWork
from bitwatt.telemetry.energy.counter import (
    DeviceState,
    EnergyChoice,
    EnergyCounter,
    Unavailable,
)
from bitwatt.telemetry.energy.device_meter import DeviceMeter
from bitwatt.telemetry.energy.ledger import EnergyLedger, RequestEnergy
from bitwatt.telemetry.energy.polling import CounterPoller
from bitwatt.telemetry.energy.sources import open_counter
from bitwatt.telemetry.metrics import Metrics, ModelMetrics

__all__ = ["EnergyMeters", "EngineObserver", "ModelEnergy"]

logger = logging.getLogger(__name__)

_LOADING = Unavailable("loading", "the engine has not said yet which device it runs on")
_STOPPED = Unavailable("stopped", "the server is stopping")
_UNMETERED = Unavailable("off", "energy is not metered")
_NOT_COVERED = "the counter has not covered the request's steps: it did not move, or is silent"

OpenCounter = Callable[[EnergyChoice, str, str | None], EnergyCounter | Unavailable]


class EnergyMeters:
    """The meters of one API process. Used from one event loop."""

    def __init__(
        self,
        choice: EnergyChoice = "auto",
        metrics: Metrics | None = None,
        *,
        open_counter: OpenCounter = open_counter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is read before an engine is bound to its device."""
        self.ledger = EnergyLedger()
        self._choice: EnergyChoice = choice
        self._metrics = metrics
        self._open_counter = open_counter
        self._clock = clock
        self._devices: dict[tuple[str, str | None], _Device | Unavailable] = {}

    def model(self, name: str, metrics: ModelMetrics | None = None) -> "ModelEnergy":
        """Return one served model's energy, to be bound when its engine is ready."""
        return ModelEnergy(name, meters=self, metrics=metrics)

    def device_of(self, info: EngineInfo) -> "_Device | Unavailable":
        """Return an engine's device, the same for the same; says once what measures it."""
        key = info.device, info.device_uuid
        if key not in self._devices:
            counter = self._open_counter(self._choice, *key)
            if isinstance(counter, Unavailable):
                # What was asked for by name is missed; without a counter by default is as usual.
                is_missed = self._choice not in ("auto", "none")
                level = logging.WARNING if is_missed else logging.INFO
                logger.log(level, "energy of %s is not measured: %s", info.device, counter.detail)
                self._devices[key] = counter
            else:
                logger.info("energy of %s is %s's, of %s", key[0], counter.source, counter.device)
                self._devices[key] = _Device(
                    DeviceMeter(counter, clock=self._clock), counter, self.ledger, self._metrics
                )
        return self._devices[key]


class ModelEnergy:
    """One served model's energy, and its requests'. Used from the event loop."""

    def __init__(
        self,
        name: str = "",
        *,
        meters: EnergyMeters | None = None,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """Without meters, nothing is measured and every figure says so."""
        self.name = name
        self.unavailable: Unavailable | None = _UNMETERED if meters is None else _LOADING
        self._meters = meters
        self._metrics = metrics
        self._ledger = EnergyLedger() if meters is None else meters.ledger
        self._device: _Device | None = None
        self._num_steps = 0

    @property
    def source(self) -> str | None:
        """What measures: "nvml", "amdsmi", "rapl", or None."""
        return None if self._device is None else self._device.meter.source

    @property
    def attribution(self) -> str:
        """How a request's share is found."""
        return "proportional" if self._device is None else self._device.attribution

    @property
    def busy_joules(self) -> float:
        """Measured joules of all the model's steps, settled."""
        return self._ledger.busy_joules(self.name)

    def bind(self, info: EngineInfo) -> None:
        """Start measuring the engine's device, when the engine is ready; once is enough."""
        if self._meters is None or self._device is not None:
            return
        device = self._meters.device_of(info)
        if isinstance(device, Unavailable):
            self.unavailable = device
        else:
            self.unavailable = None
            self._device = device
            device.add_model(self.name, self._metrics)
        if self._metrics is not None:
            reason = "" if self.unavailable is None else self.unavailable.reason
            self._metrics.describe_energy(self.source, reason)

    def unbind(self) -> None:
        """Stop measuring; the figures stay."""
        device, self._device = self._device, None
        if device is not None:
            self.unavailable = _STOPPED
            device.remove_model(self.name)

    def on_step(self, message: StepOutputs) -> None:
        """Take in what a step computed, or a heartbeat."""
        if self._device is None:
            return
        stats = message.stats
        is_step = stats.num_steps != self._num_steps
        self._num_steps = stats.num_steps
        is_idle = not stats.num_running and not stats.num_waiting
        self._device.add_step(
            self.name,
            _work_of(self.name, message) if is_step else None,
            # The step that runs now began when the last one ended.
            known_until_s=stats.time_s if is_idle else stats.step_ended_s,
        )

    def open(self, request_id: str) -> None:
        """Begin to keep a request's joules; every open is followed by a close."""
        if self._device is not None:
            self._ledger.open(request_id)

    def close(self, request_id: str) -> RequestEnergy:
        """Return what the request took, at its end or where it was given up."""
        settled = self._ledger.close(request_id)
        if self._device is None or settled is None:
            return RequestEnergy(reason=(self.unavailable or _LOADING).detail)
        unsettled = self._device.meter.unsettled_joules(request_id)
        if unsettled is None:
            return RequestEnergy(reason=_NOT_COVERED)
        return RequestEnergy(
            energy_joules=settled + unsettled,
            energy_extrapolated_joules=unsettled,
            energy_source=self.source,
            attribution=self.attribution,
        )


class _Device:
    """A device's meter with the thread that polls its counter, and who hears of its splits."""

    def __init__(
        self,
        meter: DeviceMeter,
        counter: EnergyCounter,
        ledger: EnergyLedger,
        metrics: Metrics | None,
    ) -> None:
        self.meter = meter
        self._ledger = ledger
        self._metrics = metrics
        self._models: dict[str, ModelMetrics | None] = {}
        loop = asyncio.get_running_loop()
        self._poller = CounterPoller(  # calls from its thread
            counter,
            lambda interval: loop.call_soon_threadsafe(self.on_interval, interval),
            lambda state: loop.call_soon_threadsafe(self._on_state, state),
        )
        self._poller.start()

    @property
    def attribution(self) -> str:
        is_shared = self.meter.num_models > 1
        return "proportional_shared" if is_shared else "proportional"

    def add_model(self, name: str, metrics: ModelMetrics | None) -> None:
        self.meter.add_model(name)
        self._models[name] = metrics

    def remove_model(self, name: str) -> None:
        self.meter.remove_model(name)
        del self._models[name]
        if not self._models:
            self._poller.stop()

    def add_step(self, model: str, step: StepWork | None, *, known_until_s: float) -> None:
        self.meter.add_step(model, step, known_until_s)
        self._settle()

    def on_interval(self, interval: Interval) -> None:
        self.meter.add_interval(interval)
        self._settle()

    def _settle(self) -> None:
        for split in self.meter.settle():
            self._ledger.post(split)
            for name, metrics in self._models.items():
                if metrics is None:
                    continue
                shares = split.shares_of(name, num_sharing=len(self._models))
                metrics.add_energy(self.meter.source, self.attribution, shares)
                if self.meter.idle_watts is not None:
                    metrics.set_idle_power(self.meter.source, self.meter.idle_watts)

    def _on_state(self, state: DeviceState) -> None:
        if self._metrics is not None:
            self._metrics.on_device(state)


def _work_of(model: str, message: StepOutputs) -> StepWork:
    """Return what the step just reported computed."""
    stats = message.stats
    prefill = stats.step_prefill
    # A draft is computed for its request whether it is kept or not.
    decode = [
        output.request_id
        for output in message.outputs
        if output.token_ids and output.request_id not in prefill
        for _ in range(1 + stats.step_drafts.get(output.request_id, 0))
    ]
    num_lost = stats.step_tokens - sum(prefill.values()) - len(decode)
    return StepWork(
        model=model,
        start_s=stats.step_ended_s - stats.step_s,
        end_s=stats.step_ended_s,
        prefill=prefill,
        decode=decode,
        num_lost=max(num_lost, 0),
    )


class EngineObserver:
    """What an EngineClient tells of its engine, handed on to one model's metrics and energy."""

    def __init__(self, metrics: ModelMetrics, energy: ModelEnergy) -> None:
        self._metrics = metrics
        self._energy = energy

    def on_ready(self, info: EngineInfo) -> None:
        """Take in that the engine takes requests, at first or again."""
        self._metrics.on_ready(info)
        self._energy.bind(info)

    def on_step(self, message: StepOutputs) -> None:
        """Take in a step or a heartbeat."""
        self._metrics.on_stats(message.stats)
        self._energy.on_step(message)

    def on_down(self) -> None:
        """Take in that the engine is gone, or could not be started."""
        self._metrics.on_down()

    def on_restart(self) -> None:
        """Take in that the engine is started again."""
        self._metrics.on_restart()
