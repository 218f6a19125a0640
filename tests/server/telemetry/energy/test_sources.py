"""Counters of joules, on copies of what the driver and the kernel show: a module, a folder."""

# ruff: noqa: N802 (the functions have NVML's names)

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from bitwatt.telemetry.energy.amdsmi import AmdSmiCounter
from bitwatt.telemetry.energy.counter import DeviceState, Unavailable
from bitwatt.telemetry.energy.nvml import NvmlCounter
from bitwatt.telemetry.energy.polling import CounterPoller, EdgeDetector
from bitwatt.telemetry.energy.rapl import RaplCounter
from bitwatt.telemetry.energy.sources import open_counter

UUID = "GPU-0f1e2d3c"


class FakePynvml(ModuleType):
    """NVML with one board: errors are exceptions, energy is in millijoules, names may be bytes."""

    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_SUCCESS = 0
    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, has_driver=True, has_energy=True, mig=0, has_instant_power=True):
        super().__init__("pynvml")
        self.has_driver = has_driver
        self.has_energy = has_energy
        self.mig = mig
        self.has_instant_power = has_instant_power
        self.energy_mj = 5_000_000
        self.num_open = 0

    def nvmlInit(self):
        if not self.has_driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.num_open += 1

    def nvmlShutdown(self):
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError("Not Supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert self.num_open == 1, "NVML is used while it is shut"
        if not self.has_energy:
            raise self.NVMLError("Not Supported")
        return self.energy_mj

    def nvmlDeviceGetFieldValues(self, handle, fields):
        assert fields == [186]
        failed = 0 if self.has_instant_power else 3
        return [SimpleNamespace(nvmlReturn=failed, value=SimpleNamespace(uiVal=321_500))]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 << 30, used=3 << 20, free=0)

    def nvmlDeviceGetUUID(self, handle):
        return UUID

    def nvmlDeviceGetIndex(self, handle):
        return 2

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA H100"


@pytest.fixture
def install_nvml(monkeypatch):
    def install(**traits):
        fake = FakePynvml(**traits)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


def test_a_boards_joules_are_its_drivers_millijoules(install_nvml):
    nvml = install_nvml()
    counter = open_counter("auto", "cuda:0", UUID)
    assert isinstance(counter, NvmlCounter)
    assert (counter.source, counter.device) == ("nvml", UUID)
    before = counter.read_joules()
    nvml.energy_mj += 1234
    assert counter.read_joules() - before == pytest.approx(1.234)
    counter.close()
    counter.close()
    assert nvml.num_open == 0
    assert counter.read_joules() is None
    assert counter.state() is None


def test_torchs_uuid_lacks_the_prefix(install_nvml):
    install_nvml()
    assert isinstance(NvmlCounter.open(UUID.removeprefix("GPU-")), NvmlCounter)


def test_a_driver_loaded_anew_loses_the_count_once(install_nvml):
    nvml = install_nvml()
    counter = NvmlCounter.open(UUID)
    counter.read_joules()
    nvml.energy_mj = 7
    assert counter.read_joules() is None
    nvml.energy_mj = 1007
    assert counter.read_joules() == 1.007


def test_a_failing_read_is_no_reading(install_nvml):
    nvml = install_nvml()
    counter = NvmlCounter.open(UUID)
    nvml.has_energy = False
    assert counter.read_joules() is None


@pytest.mark.parametrize("mig", [0, None])
def test_a_boards_state_has_power_energy_and_memory(install_nvml, mig):
    install_nvml(mig=mig)
    counter = NvmlCounter.open(UUID)
    counter.read_joules()
    assert counter.state() == DeviceState(
        index=2,
        uuid=UUID,
        name="NVIDIA H100",
        power_w=321.5,
        energy_mj=5_000_000,
        memory_used_bytes=3 << 20,
    )


def test_a_board_without_instant_power_shows_none_rather_than_a_mean(install_nvml):
    install_nvml(has_instant_power=False)
    assert NvmlCounter.open(UUID).state().power_w is None


@pytest.mark.parametrize(
    ("traits", "uuid", "reason"),
    [
        ({"has_driver": False}, UUID, "no_driver"),
        ({"has_energy": False}, UUID, "not_supported"),
        ({"mig": 1}, UUID, "mig"),
        ({}, "MIG-123", "mig"),
        ({}, "GPU-other", "not_supported"),
        ({}, None, "no_uuid"),
    ],
)
def test_a_board_that_cannot_be_measured_says_why(install_nvml, traits, uuid, reason):
    nvml = install_nvml(**traits)
    found = open_counter("nvml", "cuda:0", uuid)
    assert isinstance(found, Unavailable)
    assert found.reason == reason
    assert found.detail
    assert nvml.num_open == 0


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = open_counter("auto", "cuda:0", UUID)
    assert found.reason == "no_library"
    assert "bitwatt[nvidia]" in found.detail


ADDRESS = "0000:c1:00.0"


class FakeAmdSmi(ModuleType):
    """AMD's library with one board, the second of two: energy is a count of 15.259 µJ."""

    class AmdSmiException(Exception):  # noqa: N818
        pass

    AmdSmiMemoryType = SimpleNamespace(VRAM="vram")

    def __init__(self, *, has_driver=True, has_energy=True, partition="SPX", power=321):
        super().__init__("amdsmi")
        self.has_driver = has_driver
        self.has_energy = has_energy
        self.partition = partition
        self.power = power
        self.count = 5_000_000
        self.num_open = 0

    def amdsmi_init(self):
        if not self.has_driver:
            raise self.AmdSmiException("Error code:\n\t34 | no driver")
        self.num_open += 1

    def amdsmi_shut_down(self):
        self.num_open -= 1

    def amdsmi_get_processor_handle_from_bdf(self, address):
        if address != ADDRESS:
            raise self.AmdSmiException("not found")
        return "handle"

    def amdsmi_get_processor_handles(self):
        return ["other", "handle"]

    def amdsmi_get_gpu_device_bdf(self, handle):
        return ADDRESS if handle == "handle" else "0000:03:00.0"

    def amdsmi_get_gpu_compute_partition(self, handle):
        if self.partition is None:
            raise self.AmdSmiException("not supported")
        return self.partition

    def amdsmi_get_energy_count(self, handle):
        assert self.num_open == 1, "amdsmi is used while it is shut"
        if not self.has_energy:
            raise self.AmdSmiException("not supported")
        return {"energy_accumulator": self.count, "counter_resolution": 15.259, "timestamp": 1}

    def amdsmi_get_gpu_asic_info(self, handle):
        return {"market_name": "AMD Instinct MI300X"}

    def amdsmi_get_power_info(self, handle):
        return {"current_socket_power": self.power}

    def amdsmi_get_gpu_memory_usage(self, handle, kind):
        return {"vram": 3 << 20}[kind]


@pytest.fixture
def install_amdsmi(monkeypatch):
    def install(**traits):
        fake = FakeAmdSmi(**traits)
        monkeypatch.setitem(sys.modules, "amdsmi", fake)
        return fake

    return install


@pytest.mark.parametrize("power", [321, "N/A"])
def test_an_amd_boards_joules_are_its_count_times_the_resolution(install_amdsmi, power):
    smi = install_amdsmi(partition=None, power=power)
    counter = open_counter("auto", "cuda:1", ADDRESS)
    assert isinstance(counter, AmdSmiCounter)
    assert (counter.source, counter.device) == ("amdsmi", ADDRESS)
    before = counter.read_joules()
    smi.count += 100_000
    assert counter.read_joules() - before == pytest.approx(1.5259)
    smi.count = 1_000_000
    assert counter.read_joules() is None
    assert counter.state() == DeviceState(
        index=1,
        uuid=ADDRESS,
        name="AMD Instinct MI300X",
        power_w=321.0 if power == 321 else None,
        energy_mj=15259,
        memory_used_bytes=3 << 20,
    )
    smi.has_energy = False
    assert counter.read_joules() is None
    counter.close()
    counter.close()
    assert smi.num_open == 0
    assert counter.read_joules() is None
    assert counter.state() is None


@pytest.mark.parametrize(
    ("choice", "traits", "address", "reason"),
    [
        ("amdsmi", {"has_driver": False}, ADDRESS, "no_driver"),
        ("auto", {"has_energy": False}, ADDRESS, "not_supported"),
        ("auto", {"partition": "CPX"}, ADDRESS, "mig"),
        ("auto", {}, "0000:ff:00.0", "not_supported"),
        ("nvml", {}, ADDRESS, "other_device"),
        ("amdsmi", {}, UUID, "other_device"),
    ],
)
def test_an_amd_board_that_cannot_be_measured_says_why(
    install_amdsmi, choice, traits, address, reason
):
    smi = install_amdsmi(**traits)
    found = open_counter(choice, "cuda:0", address)
    assert isinstance(found, Unavailable)
    assert found.reason == reason
    assert "\n" not in found.detail
    assert smi.num_open == 0


class Powercap:
    """A folder as /sys/class/powercap: zones side by side, files of one line."""

    def __init__(self, root):
        self.root = root

    def add(self, zone, name, energy_uj=0, range_uj=1000):
        folder = self.root / zone
        folder.mkdir(parents=True)
        for file, value in [
            ("name", name),
            ("energy_uj", energy_uj),
            ("max_energy_range_uj", range_uj),
        ]:
            (folder / file).write_text(f"{value}\n")

    def set(self, zone, energy_uj):
        (self.root / zone / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with memory beside it; and zones that hold, or repeat, what those count."""
    tree = Powercap(tmp_path / "powercap")
    tree.add("intel-rapl:0", "package-0", 100)
    tree.add("intel-rapl:0:0", "core", 50)
    tree.add("intel-rapl:0:1", "dram", 10)
    tree.add("intel-rapl:1", "package-1", 200)
    tree.add("intel-rapl:2", "psys", 900)
    tree.add("intel-rapl-mmio:0", "package-0", 100)
    return tree


def test_packages_and_their_memory_are_summed_and_nothing_twice(powercap):
    counter = RaplCounter.open(powercap.root)
    assert counter.device == "package-0+dram-0+package-1"
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        powercap.set(zone, 950)
    powercap.set("intel-rapl:0:1", 17)
    powercap.set("intel-rapl:1", 203)
    assert counter.read_joules() == pytest.approx((850 + 7 + 3) / 1e6)


def test_a_counter_that_went_round_goes_on(powercap):
    counter = RaplCounter.open(powercap.root)
    powercap.set("intel-rapl:0", 990)
    assert counter.read_joules() == pytest.approx(890e-6)
    powercap.set("intel-rapl:0", 40)
    assert counter.read_joules() == pytest.approx(940e-6)


def test_a_counter_that_vanishes_is_no_reading(powercap):
    counter = RaplCounter.open(powercap.root)
    (powercap.root / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.read_joules() is None
    assert counter.state() is None
    counter.close()


def test_a_machine_without_counters_says_so(tmp_path):
    assert RaplCounter.open(tmp_path / "nothing").reason == "no_powercap"
    tree = Powercap(tmp_path / "psys-alone")
    tree.add("intel-rapl:0", "psys")
    assert RaplCounter.open(tree.root).reason == "no_powercap"


def test_a_counter_for_root_alone_is_not_readable(powercap, monkeypatch):
    # Linux shows energy_uj to root alone; the test may run as root, whom modes don't stop.
    read_text = Path.read_text

    def guarded(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    found = RaplCounter.open(powercap.root)
    assert found.reason == "not_readable"
    assert "energy_uj" in found.detail


def test_a_counter_that_is_no_number_is_not_readable(powercap):
    powercap.set("intel-rapl:0", "")
    assert RaplCounter.open(powercap.root).reason == "not_readable"


@pytest.mark.parametrize(
    ("choice", "device", "reason"),
    [
        ("none", "cpu", "off"),
        ("none", "cuda:0", "off"),
        ("nvml", "cpu", "other_device"),
        ("rapl", "cuda:0", "other_device"),
        ("auto", "none", "no_device"),
    ],
)
def test_one_devices_energy_never_stands_for_anothers(choice, device, reason):
    assert open_counter(choice, device, None).reason == reason


def observe_all(readings):
    edges = EdgeDetector()
    found = [edges.observe(moment, joules) for moment, joules in readings]
    return [(i.start_s, i.end_s, i.joules) for i in found if i is not None]


def test_intervals_lie_between_moves_of_the_counter():
    readings = [
        (0.0, 5),
        (0.05, 5),
        (0.1, 9),
        (0.15, 9),
        (0.2, 9),
        (0.25, 20),
        (0.3, 20),
        (0.4, 21),
    ]
    assert observe_all(readings) == [(0.1, 0.25, 11), (0.25, 0.4, 1)]


def test_a_counter_that_moves_at_every_read_is_taken_every_tenth_of_a_second():
    readings = [(i / 32, i) for i in range(14)]
    assert observe_all(readings) == [(1 / 32, 5 / 32, 4), (5 / 32, 9 / 32, 4), (9 / 32, 13 / 32, 4)]


def test_a_lost_count_ends_the_interval_without_joules():
    readings = [(0, 1), (1, 2), (2, None), (3, 50), (4, 51), (5, 53)]
    assert observe_all(readings) == [(4, 5, 2)]


class Ticking:
    """A counter that moves at every read."""

    source = "nvml"
    device = "GPU-0"
    poll_s = 0.005

    def __init__(self):
        self.joules = 0.0
        self.is_closed = False

    def read_joules(self):
        assert not self.is_closed
        self.joules += 1.0
        return self.joules

    def state(self):
        return DeviceState(
            index=0, uuid="GPU-0", name="x", power_w=None, energy_mj=0, memory_used_bytes=0
        )

    def close(self):
        self.is_closed = True


def test_a_sampler_tells_of_intervals_until_it_is_stopped():
    intervals, states, enough = [], [], threading.Event()

    def on_interval(interval):
        intervals.append(interval)
        if len(intervals) == 3:
            enough.set()

    counter = Ticking()
    poller = CounterPoller(counter, on_interval, states.append)
    poller.start()
    assert enough.wait(20)
    poller.stop()
    assert counter.is_closed
    assert states
    assert [i.end_s for i in intervals[:-1]] == [i.start_s for i in intervals[1:]]
    assert all(i.joules > 0 for i in intervals)
