"""An AMD GPU's energy counter, through AMD's management library. Run on no such board yet."""

import re
import threading
from typing import Any

from bitwatt.telemetry.energy.counter import DeviceState, SourceName, Unavailable

__all__ = ["AmdSmiCounter", "is_pci_address"]

_WHOLE_BOARD = "SPX"  # AMD's word for a board that is not partitioned


def is_pci_address(device_uuid: str | None) -> bool:
    """Return whether an engine names its board by domain:bus:device.function, as AMD's are."""
    return (
        re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", device_uuid or "") is not None
    )


class AmdSmiCounter:
    """Joules a board took since its driver was loaded, by steps of some 15 µJ."""

    source: SourceName = "amdsmi"
    poll_s = 0.02

    def __init__(self, amdsmi: Any, handle: Any, address: str) -> None:
        self._smi = amdsmi
        self._handle = handle
        self._last_j = 0.0
        self._lock = threading.Lock()  # close may come while a read is under way
        self._is_open = True
        self.device = address
        self._name = str(amdsmi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        addresses = map(amdsmi.amdsmi_get_gpu_device_bdf, amdsmi.amdsmi_get_processor_handles())
        self._index = next((i for i, other in enumerate(addresses) if other == address), 0)

    @classmethod
    def open(cls, address: str) -> "AmdSmiCounter | Unavailable":
        """Return the counter of the board at this PCI address, or why it can't be read."""
        try:
            import amdsmi
        except Exception as error:  # with the package and no driver it raises what it likes
            return Unavailable(
                "no_library", f"AMD's library amdsmi, which comes with ROCm, is not there: {error}"
            )
        try:
            amdsmi.amdsmi_init()
        except amdsmi.AmdSmiException as error:
            return Unavailable("no_driver", f"amdsmi does not start: {_line(error)}")
        try:
            handle = amdsmi.amdsmi_get_processor_handle_from_bdf(address)
            if _partition(amdsmi, handle) != _WHOLE_BOARD:
                amdsmi.amdsmi_shut_down()
                return Unavailable("mig", f"{address} is a part; the counter is the whole board's")
            amdsmi.amdsmi_get_energy_count(handle)
            return cls(amdsmi, handle, address)
        except amdsmi.AmdSmiException as error:
            amdsmi.amdsmi_shut_down()
            return Unavailable(
                "not_supported", f"{address} does not tell its energy: {_line(error)}"
            )

    def read_joules(self) -> float | None:
        """Return joules since the driver was loaded; None at once after it was loaded anew."""
        with self._lock:
            if not self._is_open:
                return None
            try:
                count = self._smi.amdsmi_get_energy_count(self._handle)
            except self._smi.AmdSmiException:
                return None
        now_j = count["energy_accumulator"] * count["counter_resolution"] * 1e-6
        before_j, self._last_j = self._last_j, now_j
        return None if now_j < before_j else now_j

    def state(self) -> DeviceState | None:
        """Return power, energy and memory in use; None where the driver fails."""
        smi, handle = self._smi, self._handle
        with self._lock:
            if not self._is_open:
                return None
            try:
                power_w = smi.amdsmi_get_power_info(handle)["current_socket_power"]
                used = int(smi.amdsmi_get_gpu_memory_usage(handle, smi.AmdSmiMemoryType.VRAM))
            except smi.AmdSmiException:
                return None
        return DeviceState(
            index=self._index,
            uuid=self.device,
            name=self._name,
            power_w=float(power_w) if isinstance(power_w, int) else None,  # else "N/A"
            energy_mj=round(self._last_j * 1000),
            memory_used_bytes=used,
        )

    def close(self) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._smi.amdsmi_shut_down()


def _partition(amdsmi: Any, handle: Any) -> str:
    try:
        return str(amdsmi.amdsmi_get_gpu_compute_partition(handle))
    except amdsmi.AmdSmiException:
        return _WHOLE_BOARD  # boards that can't be partitioned


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
