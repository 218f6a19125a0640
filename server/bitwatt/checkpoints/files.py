"""Files of a model folder, checked before they are read."""

import json
import stat
from pathlib import Path
from typing import Any

from bitwatt.errors import CheckpointError, shorten

__all__ = ["cause_of", "check_file", "is_there", "read_json"]

# The index of 1,800 tensors, LLaMA 405B's, takes 0.2 MB. A parsed file takes up to 24 times its
# bytes: this limit keeps that below 50 MB.
_MAX_JSON_BYTES = 2 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_there(path: Path) -> bool:
    """Return whether there is such a file, or a link in its place that leads nowhere.

    A cache of the hub's has links, and one whose file is lost must not be taken for none.
    """
    return path.is_symlink() or path.exists()


def check_file(path: Path) -> bytes:
    """Return the first bytes of a regular file; a pipe or a device is never opened.

    Raises  CheckpointError also for a Git LFS pointer, which stands in the file's place
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {cause_of(error)}") from error
    if head == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer and not the file itself: `git lfs pull` fetches that"
        )
    return head


def read_json(path: Path) -> dict[str, Any]:
    """Return the file's JSON object; CheckpointError if it holds no such."""
    check_file(path)
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {cause_of(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {shorten(value)}; expected an object")
    return value


def cause_of(error: Exception) -> str:
    """Return what an error of the system or of a library says, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())[:200]
