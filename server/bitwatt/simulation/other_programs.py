"""What other programs take of the processors, by Linux's account: they slow down what is timed."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["OtherPrograms", "undisturbed"]

_T = TypeVar("_T")
_TRIES = 3
_MOST = 0.05  # of the processors
_PARENT, _USER, _SYSTEM = 1, 11, 12  # fields of /proc/PID/stat behind the name; man 5 proc_pid_stat
_IDLE = slice(3, 5)  # idle, iowait of /proc/stat's first line; man 5 proc_stat
_GUEST = 8  # from here on: in user time already


class OtherPrograms:
    """All but this process and those it has started, from now on."""

    def __init__(self, root: int | None = None) -> None:
        """Begin; root is the process that isn't another, with its descendants, this one if None."""
        self._root = os.getpid() if root is None else root
        self._began = _ticks(self._root)

    def share(self) -> float | None:
        """Return what they took of all processors' time since; None where nothing tells."""
        ended = _ticks(self._root)
        if self._began is None or ended is None:
            return None
        total, busy, own = (now - then for now, then in zip(ended, self._began, strict=True))
        return max(0.0, busy - own) / total if total > 0 else None


async def undisturbed(
    run: Callable[[], Awaitable[_T]], report: Callable[[str], None] = lambda _line: None
) -> tuple[_T, float | None]:
    """Return what it brought when other programs took least, and what share those took.

    It runs again, twice at most, where they took more than a twentieth of the processors.
    """
    tries: list[tuple[_T, float]] = []
    for _ in range(_TRIES):
        programs = OtherPrograms()
        result = await run()
        others = programs.share()
        if others is None:
            return result, None
        tries.append((result, others))
        if others <= _MOST:
            break
        report(f"other programs took {others:.0%} of the processors meanwhile")
    return min(tries, key=lambda one: one[1])


def _ticks(root: int) -> tuple[int, int, int] | None:
    """Return the ticks of all processors, those not idle, and those of the root's family."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    of_all = [int(word) for word in line.split()[1 : 1 + _GUEST]]
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended since
        fields = told.rpartition(")")[2].split()
        process = int(folder.name)
        parents[process] = int(fields[_PARENT])
        used[process] = int(fields[_USER]) + int(fields[_SYSTEM])
    own = sum(ticks for process, ticks in used.items() if _descends(process, root, parents))
    return sum(of_all), sum(of_all) - sum(of_all[_IDLE]), own


def _descends(process: int, root: int, parents: dict[int, int]) -> bool:
    while process and process != root:
        process = parents.get(process, 0)
    return process == root
