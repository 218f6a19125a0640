"""Which counter measures a device's joules, chosen in one place."""

from bitwatt.telemetry.energy.amdsmi import AmdSmiCounter, is_pci_address
from bitwatt.telemetry.energy.counter import EnergyChoice, EnergyCounter, Unavailable
from bitwatt.telemetry.energy.nvml import NvmlCounter
from bitwatt.telemetry.energy.rapl import RaplCounter

__all__ = ["open_counter"]


def open_counter(
    choice: EnergyChoice, device: str, device_uuid: str | None
) -> EnergyCounter | Unavailable:
    """Return the counter of an engine's device, as EngineInfo names it, or why there is none.

    A GPU's is the driver's (NVML, or AMD's), a CPU's the package's (RAPL); the choice narrows, and
    never puts one device's energy for another's.
    """
    kind = device.partition(":")[0]
    if choice == "none":
        return Unavailable("off", "energy is not measured with --energy-source none")
    if kind == "cuda":
        if choice == "rapl":
            return Unavailable("other_device", f"rapl measures CPUs; the engine runs on {device}")
        by_address = device_uuid if is_pci_address(device_uuid) else None
        if choice == ("nvml" if by_address else "amdsmi"):
            maker = "NVIDIA" if by_address else "AMD"
            return Unavailable(
                "other_device", f"{choice} measures {maker}'s GPUs; {device} is none"
            )
        return (
            NvmlCounter.open(device_uuid) if by_address is None else AmdSmiCounter.open(by_address)
        )
    if kind == "cpu":
        if choice in ("nvml", "amdsmi"):
            return Unavailable(
                "other_device", f"{choice} measures GPUs; the engine runs on the CPU"
            )
        return RaplCounter.open()
    return Unavailable("no_device", f"the engine runs on no device that is known: {device}")
