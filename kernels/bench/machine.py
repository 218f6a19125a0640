"""What the benchmarks ran on, what that machine sustains, and what it draws."""

import platform
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bitwatt_kernels.gpu.timing import Timer
from bitwatt_kernels.roofline import Gpu

__all__ = ["EnergyMeter", "describe_machine", "measure_rates"]

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


def measure_rates(device: torch.device, timer: Timer, size: int) -> tuple[Gpu, dict[str, Any]]:
    """Return what the GPU sustains on size³ matmuls, a copy and an empty kernel, with the samples.

    The roofline is drawn from these, not from a data sheet.
    """
    source = torch.zeros(size * size * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer.measure([lambda: target.copy_(source)])
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    b = torch.randn(size, size, device=device).to(torch.bfloat16)
    bf16 = timer.measure([lambda: torch.mm(a, b.T)])
    a8, b8 = (torch.randint(-9, 9, (size, size), device=device).to(torch.int8) for _ in range(2))
    int8 = timer.measure([lambda: torch._int_mm(a8, b8.T)])
    one = torch.zeros(1, device=device)
    empty = timer.measure([lambda: one.add_(1)] * 500)
    operations = 2 * size**3
    gpu = Gpu(
        bandwidth_bytes_s=2 * source.nbytes / copy.median_s,
        int8_ops_s=operations / int8.median_s,
        bf16_ops_s=operations / bf16.median_s,
        kernel_s=empty.median_s,
    )
    samples = {"copy": copy, "bf16_mm": bf16, "int8_mm": int8, "empty_kernel": empty}
    return gpu, asdict(gpu) | {name: timing.to_dict() for name, timing in samples.items()}


class EnergyMeter:
    """The GPU's own energy counter, read through NVML.

    unavailable  why there is no counter, or None
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
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            self.unavailable = f"NVML: {error}"

    def joules(self) -> float | None:
        """Return the energy drawn since the driver was loaded, or None without a counter."""
        if self.unavailable is not None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


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
