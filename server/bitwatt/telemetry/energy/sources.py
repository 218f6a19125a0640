"""Which counter measures a device's joules, chosen in one place."""

from bitwatt.telemetry.energy.counter import EnergyChoice, EnergyCounter, Unavailable
from bitwatt.telemetry.energy.nvml import NvmlCounter
from bitwatt.telemetry.energy.rapl import RaplCounter

__all__ = ["open_counter"]


def open_counter(
    choice: EnergyChoice, device: str, device_uuid: str | None
) -> EnergyCounter | Unavailable:
    """Return the counter of an engine's device, as EngineInfo names it, or why there is none.

    A GPU's is the driver's (NVML), a CPU's the package's (RAPL); the choice narrows, and never
    puts one device's energy for another's.
    """
    kind = device.partition(":")[0]
    if choice == "none":
        return Unavailable("off", "energy is not measured with --energy-source none")
    if kind == "cuda":
        if choice == "rapl":
            return Unavailable("other_device", f"rapl measures CPUs; the engine runs on {device}")
        return NvmlCounter.open(device_uuid)
    if kind == "cpu":
        if choice == "nvml":
            return Unavailable("other_device", "nvml measures GPUs; the engine runs on the CPU")
        return RaplCounter.open()
    return Unavailable("no_device", f"the engine runs on no device that is known: {device}")
