"""Private folders for engines' sockets, with a path short enough for one, and none left behind.

A folder is locked while its process lives, so that another can tell one left by a SIGKILL: process
ids wouldn't do, as containers that share a folder count them apart.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bitwatt.engine.environment import runtime_folders

__all__ = ["socket_folder"]

_PREFIX = "bitwatt-engine-"
_MAX_FOLDER_BYTES = 107 - len("/engine")  # sockaddr_un holds 107, macOS's 103
_STALE_S = 60.0  # a younger folder may be about to be locked


@contextmanager
def socket_folder(parents: Sequence[Path] | None = None) -> Iterator[Path]:
    """Yield a new folder, mode 0700, in the first of the parents that can have one.

    parents  None takes the system's folders for temporary files

    Raises   OSError that says what is wrong with each
    """
    folder = _make(runtime_folders() if parents is None else parents)
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_stale(folder.parent)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(parents: Sequence[Path]) -> Path:
    reasons = []
    for parent in parents:
        if len(os.fsencode(parent / f"{_PREFIX}12345678")) > _MAX_FOLDER_BYTES:
            reasons.append(f"{parent} is too long a path for a socket")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
    raise OSError(f"no folder for the engine's socket: {'; '.join(reasons)} (TMPDIR)")


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or just gone
            if time.time() - folder.stat().st_mtime < _STALE_S:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
