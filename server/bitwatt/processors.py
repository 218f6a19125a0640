"""What the processor is called."""

import platform
from pathlib import Path

__all__ = ["cpu_name"]

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Return the processor's product name; its architecture where the system doesn't tell it.

    Source  man 5 proc_cpuinfo; on ARM it has no line "model name"
    """
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())
