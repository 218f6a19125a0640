"""What the benchmarks ran on, what that machine sustains, and what it draws."""

import math
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bitwatt_kernels.gpu.timing import Timer, Timing
from bitwatt_kernels.roofline import Gpu

__all__ = ["Board", "describe_machine", "gpu_rates", "measure_rates"]

PACKAGES = ("torch", "triton", "numpy", "transformers", "nvidia-ml-py")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return hardware, driver, versions and commit."""
    machine: dict[str, Any] = {
        "host": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "packages": {name: _version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "driver": _driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "num_multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return machine


def measure_rates(
    device: torch.device, timer: Timer, size: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the GPU sustains on size³ matmuls, a copy and an empty kernel, with the samples.

    The roofline is drawn from these, not from a data sheet. What fails is left out, and the second
    result says why, by name.
    """
    operations = 2 * size**3

    def copy() -> Timing:
        source = torch.zeros(size * size * 8, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timer.measure([lambda: target.copy_(source)])

    def empty() -> Timing:
        one = torch.zeros(1, device=device)
        return timer.measure([lambda: one.add_(1)] * 500)

    def bf16() -> Timing:
        a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
        return timer.measure([lambda: torch.mm(a, b.T)])

    def int8() -> Timing:
        a, b = (torch.randint(-9, 9, (size, size), device=device).to(torch.int8) for _ in range(2))
        return timer.measure([lambda: torch._int_mm(a, b.T)])

    rates: dict[str, tuple[str, Callable[[], Timing], Callable[[float], float]]] = {
        "bandwidth_bytes_s": ("copy", copy, lambda s: 2 * size * size * 8 / s),
        "kernel_s": ("empty_kernel", empty, lambda s: s),
        "bf16_ops_s": ("bf16_mm", bf16, lambda s: operations / s),
        "int8_ops_s": ("int8_mm", int8, lambda s: operations / s),
    }
    figures: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, (what, measure, rate) in rates.items():
        try:
            timing = measure()
        except Exception as error:
            failed[name] = f"{what}: {error!r}"[:300]
            continue
        figures |= {name: rate(timing.median_s), what: timing.to_dict()}
    return figures, failed


def gpu_rates(figures: Mapping[str, Any]) -> Gpu:
    """Return the rates measured; one that isn't there sets no floor."""
    return Gpu(
        bandwidth_bytes_s=figures.get("bandwidth_bytes_s", math.inf),
        int8_ops_s=figures.get("int8_ops_s", math.inf),
        bf16_ops_s=figures.get("bf16_ops_s", math.inf),
        kernel_s=figures.get("kernel_s", 0.0),
    )


class Board:
    """The GPU as NVML sees it: its energy counter, clocks, power and temperature.

    unavailable  why it can't be read, or None
    """

    def __init__(self, device: torch.device) -> None:
        self.unavailable: str | None = None
        if device.type != "cuda":
            self.unavailable = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.unavailable = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        except pynvml.NVMLError as error:
            self.unavailable = f"NVML: {error}"

    def joules(self) -> float | None:
        """Return the energy drawn since the driver was loaded, or None without a counter."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def now(self) -> dict[str, float]:
        """Return clocks in MHz, watts, degrees Celsius and NVML's bits of what slows the clocks.

        What the board doesn't tell is left out.
        """
        if self.unavailable is not None:
            return {}
        nvml = self._nvml
        reads = {
            "sm_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "milliwatts": self._read("nvmlDeviceGetPowerUsage"),
            "celsius": self._read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "throttle_bits": self._read("nvmlDeviceGetCurrentClocksThrottleReasons"),
        }
        state = {name: value for name, value in reads.items() if value is not None}
        if "milliwatts" in state:
            state["watts"] = state.pop("milliwatts") / 1000
        return state

    @contextmanager
    def watch(self, *, period_s: float = 0.05) -> Iterator[dict[str, float]]:
        """Give a dict that holds, once the block has ended, the medians of what it saw meanwhile.

        Throttling counts if it was seen once.
        """
        state: dict[str, float] = {}
        if self.unavailable is not None:
            yield state
            return
        samples: list[dict[str, float]] = []
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(period_s):
                samples.append(self.now())

        thread = threading.Thread(target=look, name="board", daemon=True)
        thread.start()
        try:
            yield state
        finally:
            is_over.set()
            thread.join()
            samples = samples or [self.now()]
            for name in samples[0]:
                values = [sample[name] for sample in samples if name in sample]
                state[name] = statistics.median(values)
            if "throttle_bits" in state:
                bits = 0
                for sample in samples:
                    bits |= int(sample.get("throttle_bits", 0))
                state["throttle_bits"] = bits

    def _read(self, name: str, *arguments: object) -> float | None:
        if self.unavailable is not None:
            return None
        try:
            return float(getattr(self._nvml, name)(self._handle, *arguments))
        except (self._nvml.NVMLError, AttributeError):  # not every board, nor version, has each
            return None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        return None
