"""Ends this process with its parent, however the parent dies."""

import ctypes
import os
import signal
import sys
import threading
import time

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.25


def end_with_parent(parent_id: int) -> None:
    """Have this process killed once its parent is gone, or was gone before.

    parent_id  as the parent knew itself: getppid() here may already be another's
    """
    if sys.platform == "linux":
        # At the death of the thread that started this process, which is the event loop's.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def look() -> None:
        while os.getppid() == parent_id:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
