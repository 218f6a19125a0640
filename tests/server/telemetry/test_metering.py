"""From an engine's steps and a counter's intervals to a request's joules and the metrics."""

import asyncio
import time

import pytest
from bitwatt.engine.client import EngineClient
from bitwatt.engine.messages import EngineConfig, EngineStats, StepOutputs, Submit, TokenOutput
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.energy.attribution import Interval
from bitwatt.telemetry.energy.counter import DeviceState, Unavailable
from bitwatt.telemetry.energy.ledger import RequestEnergy, total_energy
from bitwatt.telemetry.metering import EnergyMeters, EngineObserver, ModelEnergy
from bitwatt.telemetry.metrics import Metrics

from tests.fakes import FakeEngine, make_app, make_client, make_info, untimed


class Counter:
    """A counter at rest: tests hand intervals over themselves."""

    source = "rapl"
    device = "package-0"
    poll_s = 0.01

    def __init__(self):
        self.is_closed = False

    def read_joules(self):
        return 0.0

    def state(self):
        return None

    def close(self):
        self.is_closed = True


class Bench:
    """Models whose engines share one device."""

    def __init__(self, *names, has_metrics=True):
        self.metrics = Metrics()
        self.counter = Counter()
        self.now_s = 0.0
        meters = EnergyMeters(
            metrics=self.metrics,
            open_counter=lambda *_: self.counter,
            clock=lambda: self.now_s,
        )
        self.models = [
            meters.model(name, self.metrics.model(name) if has_metrics else None) for name in names
        ]
        for model in self.models:
            model.bind(make_info(device="cpu"))
        self.device = meters.device_of(make_info(device="cpu"))
        self.num_steps = 0

    def step(self, model, start_s, end_s, *, prefill=None, decode=(), drafts=None, num_tokens=None):
        self.num_steps += 1
        prefill, drafts = prefill or {}, drafts or {}
        drawn = [TokenOutput(request_id=name, token_ids=[1]) for name in decode]
        aborted = TokenOutput(request_id="gone", token_ids=[], finish_reason=FinishReason.ABORT)
        stats = EngineStats(
            num_running=1,
            num_steps=self.num_steps,
            step_tokens=num_tokens or sum(prefill.values()) + len(decode) + sum(drafts.values()),
            step_s=end_s - start_s,
            step_ended_s=end_s,
            step_prefill=prefill,
            step_drafts=drafts,
            time_s=end_s,
        )
        model.on_step(StepOutputs(outputs=[*drawn, aborted], stats=stats))

    def heartbeat(self, model, time_s):
        model.on_step(
            StepOutputs(outputs=[], stats=EngineStats(num_steps=self.num_steps, time_s=time_s))
        )

    def joules(self, name, phase, attribution="proportional"):
        labels = {
            "model_name": name,
            "engine": "0",
            "source": "rapl",
            "attribution": attribution,
            "phase": phase,
        }
        return self.metrics.registry.get_sample_value("bitwatt_energy_joules_total", labels)

    def close(self):
        for model in self.models:
            model.unbind()
        assert self.counter.is_closed


@pytest.mark.anyio
async def test_a_requests_joules_are_its_share_of_the_steps_it_was_in():
    bench = Bench("m")
    [model] = bench.models
    model.open("a")
    model.open("b")
    bench.step(model, 0, 1, prefill={"a": 3, "b": 1})
    bench.device.on_interval(Interval(0, 1, 80.0))
    bench.step(model, 1, 2, decode=["a", "b"])
    bench.step(model, 2, 3, decode=["a"], num_tokens=2)
    bench.device.on_interval(Interval(1, 3, 80.0))
    bench.device.on_interval(Interval(3, 4, 20.0))
    assert bench.joules("m", "idle") == 0
    bench.heartbeat(model, 4.5)
    a, b = model.close("a"), model.close("b")
    bench.close()
    assert (a.energy_source, a.attribution) == ("rapl", "proportional")
    assert a.energy_joules == 60 + 20 + 20
    assert b.energy_joules == 20 + 20
    assert a.energy_extrapolated_joules == b.energy_extrapolated_joules == 0
    phases = {phase: bench.joules("m", phase) for phase in ("prefill", "decode", "idle")}
    assert phases == {"prefill": 80, "decode": 60, "idle": 20}
    assert bench.joules("m", "unattributed") == 20
    assert model.busy_joules == 140


@pytest.mark.anyio
async def test_a_draft_is_paid_for_by_the_request_it_was_verified_for():
    """Accepted or not: one output for each, and four tokens computed, three of them for a."""
    bench = Bench("m")
    [model] = bench.models
    model.open("a")
    model.open("b")
    bench.step(model, 0, 1, decode=["a", "b"], drafts={"a": 2})
    bench.device.on_interval(Interval(0, 1, 80.0))
    bench.device.on_interval(Interval(1, 2, 0.0))
    bench.heartbeat(model, 2.5)
    a, b = model.close("a"), model.close("b")
    bench.close()
    assert (a.energy_joules, b.energy_joules) == (60, 20)
    assert bench.joules("m", "unattributed") == 0


@pytest.mark.anyio
async def test_joules_are_counted_whether_or_not_metrics_show_them():
    # The joules of a model's steps grew only where a registry was there to show them.
    bench = Bench("m", has_metrics=False)
    [model] = bench.models
    bench.step(model, 0, 1, decode=["a"])
    bench.device.on_interval(Interval(0, 1, 40.0))
    bench.heartbeat(model, 2)
    bench.close()
    assert model.busy_joules == 40


@pytest.mark.anyio
async def test_an_interval_waits_for_the_step_that_ran_at_its_end():
    bench = Bench("m")
    [model] = bench.models
    bench.heartbeat(model, 0.9)
    bench.device.on_interval(Interval(0, 1, 10.0))
    assert bench.joules("m", "idle") is None
    bench.step(model, 0.5, 1.5, decode=["a"])
    bench.close()
    assert bench.joules("m", "decode") == 5
    assert bench.joules("m", "idle") == 5


@pytest.mark.anyio
async def test_the_last_steps_are_extrapolated_until_the_counter_moves():
    bench = Bench("m")
    [model] = bench.models
    model.open("a")
    bench.step(model, 0, 1, decode=["a"])
    assert model.close("a").reason
    model.open("b")
    bench.device.on_interval(Interval(0, 1, 100.0))
    bench.step(model, 1, 1.25, decode=["b"])
    b = model.close("b")
    bench.close()
    assert (b.energy_joules, b.energy_extrapolated_joules) == (25, 25)


@pytest.mark.anyio
async def test_engines_on_one_device_share_its_idle_power_and_say_shared():
    bench = Bench("m", "n")
    m, n = bench.models
    m.open("a")
    bench.step(m, 0, 1, decode=["a"])
    bench.device.on_interval(Interval(0, 2, 40.0))
    assert bench.joules("m", "decode", "proportional_shared") is None
    bench.heartbeat(m, 3)
    bench.heartbeat(n, 3)
    assert m.close("a").attribution == "proportional_shared"
    bench.close()
    found = {
        (name, phase): bench.joules(name, phase, "proportional_shared")
        for name in "mn"
        for phase in ("decode", "idle")
    }
    assert found == {("m", "decode"): 20, ("m", "idle"): 10, ("n", "decode"): 0, ("n", "idle"): 10}


@pytest.mark.anyio
async def test_an_engine_that_fell_silent_holds_nothing_up():
    bench = Bench("m")
    bench.device.on_interval(Interval(0, 1, 10.0))
    bench.now_s = 100.0
    bench.device.on_interval(Interval(1, 2, 10.0))
    bench.close()
    assert bench.joules("m", "unattributed") == 20
    assert bench.joules("m", "idle") == 0


@pytest.mark.anyio
async def test_a_restarted_engines_steps_are_taken_on():
    bench = Bench("m")
    [model] = bench.models
    bench.step(model, 0, 1, decode=["a"])
    bench.num_steps = 0
    bench.heartbeat(model, 2)
    bench.step(model, 2, 3, decode=["a"])
    bench.device.on_interval(Interval(0, 3, 30.0))
    bench.close()
    assert bench.joules("m", "decode") == 20


@pytest.mark.anyio
async def test_what_cannot_be_measured_has_a_reason_and_no_joules():
    metrics = Metrics()
    meters = EnergyMeters(open_counter=lambda *_: Unavailable("no_powercap", "no counter here"))
    model = meters.model("m", metrics.model("m"))
    assert "not said yet" in model.close("a").reason
    model.bind(make_info())
    model.open("a")
    model.on_step(StepOutputs(outputs=[], stats=EngineStats(num_steps=1)))
    assert model.close("a") == RequestEnergy(reason="no counter here")
    text = metrics.render()[0].decode()
    assert (
        'bitwatt_energy_available{engine="0",model_name="m",reason="no_powercap",source="none"} 0.0'
        in text
    )
    assert "bitwatt_energy_joules_total{" not in text
    assert "bitwatt_idle_power_watts{" not in text


@pytest.mark.anyio
@pytest.mark.parametrize(("choice", "level"), [("auto", "INFO"), ("nvml", "WARNING")])
async def test_a_device_that_cannot_be_measured_is_told_of_once(caplog, choice, level):
    # It was told once a model, at WARNING, on every machine without a counter.
    meters = EnergyMeters(choice, open_counter=lambda *_: Unavailable("no_powercap", "none here"))
    with caplog.at_level("INFO"):
        for name in "mn":
            meters.model(name).bind(make_info(device="cpu"))
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [(level, "energy of cpu is not measured: none here")]


@pytest.mark.anyio
async def test_a_measured_model_says_by_what():
    bench = Bench("m")
    bench.close()
    text = bench.metrics.render()[0].decode()
    assert 'bitwatt_energy_available{engine="0",model_name="m",reason="",source="rapl"} 1.0' in text


def test_choices_add_up_and_one_without_a_figure_leaves_none():
    one = RequestEnergy(
        energy_joules=2.0,
        energy_extrapolated_joules=0.5,
        energy_source="nvml",
        attribution="proportional",
    )
    both = total_energy([one, one])
    assert (both.energy_joules, both.energy_extrapolated_joules) == (4, 1)
    assert total_energy([one, RequestEnergy(reason="x")]) == RequestEnergy(reason="x")
    assert total_energy([]).reason


@pytest.mark.anyio
async def test_usage_has_null_and_the_reason_where_nothing_is_measured():
    async with make_client(make_app(FakeEngine())) as client:
        body = {"model": "tiny", "prompt": "a", "n": 2}
        usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    assert untimed(usage)["bitwatt"] == {
        "energy_joules": None,
        "energy_extrapolated_joules": None,
        "energy_source": None,
        "attribution": None,
        "reason": "energy is not metered",
    }


@pytest.mark.anyio
async def test_a_boards_state_is_shown_under_dcgms_names():
    seen = asyncio.Event()

    class Watched(Metrics):
        def on_device(self, state):
            super().on_device(state)
            seen.set()

    class Board(Counter):
        def state(self):
            return DeviceState(
                index=1,
                uuid="GPU-1",
                name="H100",
                power_w=250.0,
                energy_mj=77,
                memory_used_bytes=3 << 20,
            )

    metrics = Watched()
    meters = EnergyMeters(metrics=metrics, open_counter=lambda *_: Board())
    model = meters.model("m", metrics.model("m"))
    model.bind(make_info(device="cuda:0", device_uuid="GPU-1"))
    labels = {"gpu": "1", "UUID": "GPU-1", "modelName": "H100"}

    def value(name):
        return metrics.registry.get_sample_value(name, labels)

    async with asyncio.timeout(20):
        await seen.wait()
    model.unbind()
    assert value("DCGM_FI_DEV_POWER_USAGE") == 250
    assert value("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION") == 77
    assert value("DCGM_FI_DEV_FB_USED") == 3


def test_a_model_without_meters_measures_nothing():
    model = ModelEnergy()
    model.bind(make_info())
    model.open("a")
    assert model.close("a").energy_joules is None
    assert model.source is None


class Steady(Counter):
    """A counter at a steady power."""

    watts = 100.0

    def read_joules(self):
        return self.watts * time.monotonic()


async def read_all(model, client, request_id):
    sampling = ResolvedSampling(max_tokens=200, seed=1)
    model.open(request_id)
    submit = Submit(request_id=request_id, prompt_token_ids=[1] * 30, sampling=sampling)
    async for _ in client.submit(submit):
        pass
    return model.close(request_id)


@pytest.mark.anyio
async def test_requests_and_idle_time_of_a_real_engine_add_up_to_the_counter(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 97}')
    metrics = Metrics()
    meters = EnergyMeters(open_counter=lambda *_: Steady())
    model = meters.model("m", metrics.model("m"))
    observer = EngineObserver(metrics.model("m"), model)
    client = EngineClient(
        EngineConfig(model_path=str(tmp_path), backend="fake"),
        on_ready=observer.on_ready,
        on_step=observer.on_step,
        on_down=observer.on_down,
    )
    await client.start()
    try:
        async with asyncio.timeout(60):
            began_s = time.monotonic()
            await client.wait_ready()
            await asyncio.sleep(1.0)
            first = await read_all(model, client, "warm")
            await asyncio.sleep(1.0)
            energies = await asyncio.gather(*(read_all(model, client, name) for name in "abcd"))
            await asyncio.sleep(1.5)  # past the heartbeat that settles the last interval
    finally:
        model.unbind()
        ended_s = time.monotonic()
        await client.stop()
    phases = {
        sample.labels["phase"]: sample.value
        for sample in next(iter(metrics[declared.ENERGY].collect())).samples
        if sample.name.endswith("_total")
    }
    assert first.energy_joules is None or first.energy_joules >= 0
    assert all(energy.energy_source == "rapl" for energy in energies)
    assert phases["prefill"] > 0
    assert phases["decode"] > 0
    assert sum(energy.energy_joules for energy in energies) > 0
    # What was metered is the counter's, less the moments before its first edge and after its last.
    measured_s = sum(phases.values()) / Steady.watts
    assert 2.0 < measured_s <= ended_s - began_s
