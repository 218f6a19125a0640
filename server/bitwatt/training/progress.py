"""How far a run is: a bar on a terminal, a line an evaluation anywhere."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from bitwatt_client.terminal import duration

from bitwatt.training.checkpoint import RunRecord
from bitwatt.training.train import Watch

_WIDTH = 24
_STEPS_OF_A_RATE = 20


@contextmanager
def ended_by_ctrl_c(watch: Watch) -> Iterator[None]:
    """Have Ctrl-C end the run that `watch` follows after its step, and the second one at once."""
    before = signal.getsignal(signal.SIGINT)

    def stop(_number: int, _frame: FrameType | None) -> None:
        watch.is_stopped = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """Tells of a run's steps and evaluations; what the loop is given to call, and asked to stop by.

    is_stopped   set it, from a signal's handler say, and the loop ends after its step
    """

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_stopped = False
        self._out = out
        self._has_bar = out.isatty()
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=_STEPS_OF_A_RATE + 1)
        self._began: tuple[float, float] | None = None  # moment and progress of the first step

    def stepped(self, record: RunRecord, loss: float) -> None:
        """Take a step's end: the record so far, and the step's loss in nats a token."""
        now = self._clock()
        self._recent.append((now, record.num_tokens))
        if self._began is None:
            self._began = now, record.progress
        if self._has_bar:
            self._out.write(f"\r\x1b[K{self._bar(record, loss)}")
            self._out.flush()

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """Take what `loss.jsonl` gets."""
        self.clear()
        self._out.write(
            f"{line['tokens']:,} tokens, {line['minutes']:.1f} min: training "
            f"{line['training_nats_per_token']:.3f}, held-out text "
            f"{line['validation_nats_per_token']:.3f}, held-out answers "
            f"{line['answer_nats_per_token']:.3f} nats a token\n"
        )
        self._out.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self._has_bar:
            self._out.write("\r\x1b[K")

    def _bar(self, record: RunRecord, loss: float) -> str:
        share = min(record.progress, 1.0)
        filled = round(share * _WIDTH)
        parts = [f"{'█' * filled}{'·' * (_WIDTH - filled)} {share:.0%}", f"loss {loss:.3f}"]
        (first, tokens_before), (now, tokens) = self._recent[0], self._recent[-1]
        if now > first:
            parts.append(f"{(tokens - tokens_before) / (now - first):,.0f} tokens/s")
        assert self._began is not None
        began, share_before = self._began
        if share > share_before:
            parts.append(f"{duration((now - began) * (1 - share) / (share - share_before))} left")
        return ", ".join(parts)
