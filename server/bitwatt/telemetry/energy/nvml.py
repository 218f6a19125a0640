"""A GPU's energy counter, through NVIDIA's management library (Volta and newer)."""

import threading
from typing import Any

from bitwatt.telemetry.energy.counter import DeviceState, SourceName, Unavailable

__all__ = ["NvmlCounter"]


class NvmlCounter:
    """Joules a board took since its driver was loaded.

    The counter moves every 20 to 100 ms, so it is polled more often and read when it moves.
    """

    source: SourceName = "nvml"
    poll_s = 0.02

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml = pynvml
        self._handle = handle
        self._last_mj = 0
        self._lock = threading.Lock()  # close may come while a read is under way
        self._is_open = True
        self.device = _text(pynvml.nvmlDeviceGetUUID(handle))
        self._index = int(pynvml.nvmlDeviceGetIndex(handle))
        self._name = _text(pynvml.nvmlDeviceGetName(handle))

    @classmethod
    def open(cls, device_uuid: str | None) -> "NvmlCounter | Unavailable":
        """Return the counter of the board with this UUID, or why it can't be read."""
        try:
            import pynvml
        except ImportError:
            return Unavailable(
                "no_library", "nvidia-ml-py is not installed; pip install 'bitwatt[nvidia]'"
            )
        if device_uuid is None:
            return Unavailable("no_uuid", "the engine could not tell which board it runs on")
        uuid = device_uuid if device_uuid.startswith(("GPU-", "MIG-")) else f"GPU-{device_uuid}"
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return Unavailable(
                "no_driver",
                f"NVML does not start: {error}; a container needs the driver capability utility",
            )
        try:
            return cls._open(pynvml, uuid)
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            return Unavailable("not_supported", f"{uuid} does not tell its energy: {error}")

    @classmethod
    def _open(cls, pynvml: Any, uuid: str) -> "NvmlCounter | Unavailable":
        """Return the counter; raises NVMLError."""
        handle = None if uuid.startswith("MIG-") else pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if handle is None or _is_mig(pynvml, handle):
            pynvml.nvmlShutdown()
            return Unavailable("mig", f"{uuid} is a slice; the counter is the whole board's")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return cls(pynvml, handle)

    def read_joules(self) -> float | None:
        """Return joules since the driver was loaded; None at once after it was loaded anew."""
        with self._lock:
            if not self._is_open:
                return None
            try:
                now_mj = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
            except self._nvml.NVMLError:
                return None
        before_mj, self._last_mj = self._last_mj, now_mj
        return None if now_mj < before_mj else now_mj / 1000

    def state(self) -> DeviceState | None:
        """Return power, energy and memory in use; None where the driver fails."""
        nvml, handle = self._nvml, self._handle
        with self._lock:
            if not self._is_open:
                return None
            try:
                power_w = self._power_w()
                memory_used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            except nvml.NVMLError:
                return None
        return DeviceState(
            index=self._index,
            uuid=self.device,
            name=self._name,
            power_w=power_w,
            energy_mj=self._last_mj,
            memory_used_bytes=memory_used_bytes,
        )

    def close(self) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._nvml.nvmlShutdown()

    def _power_w(self) -> float | None:
        """Return watts now; None where the board doesn't tell (its other figure is a mean)."""
        [field] = self._nvml.nvmlDeviceGetFieldValues(
            self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT]
        )
        if field.nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return float(field.value.uiVal) / 1000


def _is_mig(pynvml: Any, handle: Any) -> bool:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return False  # boards that can't be sliced
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
