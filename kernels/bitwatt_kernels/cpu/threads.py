"""How many threads the CPU kernels may use."""

import os
from pathlib import Path

from bitwatt_kernels.errors import BackendError

__all__ = ["available_threads", "default_threads"]

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """Return BITWATT_CPU_THREADS, or else what is available.

    Raises  BackendError if the variable holds no count
    """
    value = os.environ.get("BITWATT_CPU_THREADS")
    if not value:
        return available_threads()
    if not value.isdecimal() or int(value) < 1:
        raise BackendError(f"BITWATT_CPU_THREADS is {value!r}; expected a count of at least 1")
    return int(value)


def available_threads() -> int:
    """Return the cores this process may run on, within its container's quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, int(quota) // int(period)))
