"""How many threads the CPU kernels may use."""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path, PurePosixPath

from bitwatt_kernels.errors import BackendError

__all__ = ["available_threads", "count_threads"]

_ROOT = Path("/")


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
    """Return the cores this process may run on, within its control groups' quotas; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Yield the whole cores that each control group above this process grants.

    A group's own quota may be wider than its parents', and a container sees its group at the root.

    Source  man 7 cgroups, /proc/pid/cgroup: hierarchy-ID:controller-list:cgroup-path
    """
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = _ROOT / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            folders = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder, name in product(folders, (group, *group.parents)):
            quota = _quota(folder / name)
            if quota is not None:
                yield quota


def _quota(group: Path) -> int | None:
    """Return the whole cores that the group grants; None if it has no quota."""
    try:
        if (group / "cpu.max").exists():  # version 2
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        granted = int(quota) // int(period)
    except (OSError, ValueError, ZeroDivisionError):  # version 2 says "max"
        return None
    return granted if int(quota) > 0 else None
