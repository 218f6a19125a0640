"""How long a mask may take.

llguidance's limits bound a mask's time but loosely. Only who waits looks at clocks: to note when
each mask begins would cost half as much again.
"""

import logging
import time

from bitwatt.constraints.constraint import Constraint

__all__ = ["LOOK_S", "MASK_TIME_LIMIT_S", "MaskWatch", "give_up"]

MASK_TIME_LIMIT_S = 0.05  # of processor time, a thousand times what a JSON schema's takes
LOOK_S = 0.01  # from one look at the mask under way to the next
_LONGEST_WAIT_S = 5.0  # for a thread that works on a mask and gets no processor time for it

logger = logging.getLogger(__name__)


class MaskWatch:
    """What was seen of a thread's mask under way at the look that it was first seen at."""

    def __init__(self) -> None:
        self._number = -1
        self._cpu_s = 0.0
        self._s = 0.0

    def is_over(self, number: int, cpu_s: float) -> bool:
        """Whether that mask was under way at an earlier look, and has taken too long since.

        number  of the mask, among all of the thread's
        cpu_s   of the thread, until now
        """
        now_s = time.monotonic()
        if number != self._number:
            self._number, self._cpu_s, self._s = number, cpu_s, now_s
        return cpu_s - self._cpu_s > MASK_TIME_LIMIT_S or now_s - self._s > _LONGEST_WAIT_S


def give_up(constraint: Constraint) -> None:
    """Fail a request whose mask takes too long, and its grammar."""
    told = (
        f"a mask of its grammar took more than {1000 * MASK_TIME_LIMIT_S:.0f} ms; that is the limit"
    )
    logger.warning("a request is given up: %s", told)
    constraint.grammar.failure = told
    constraint.fail(told)
