"""How many threads the CPU kernels may use."""

import os
from pathlib import Path

from bitwatt_kernels.errors import BackendError

__all__ = ["available_threads", "count_threads"]

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_threads(num_threads: int | None) -> int:
    """Return num_threads, or for None what is available.

    Raises  BackendError if it is no count
    """
    if num_threads is None:
        return available_threads()
    if num_threads < 1:
        raise BackendError(f"{num_threads} threads; expected at least 1 (--num-threads)")
    return num_threads


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
