"""What bounds an engine's decoding: the weights a step reads, and how fast memory gives them."""

from collections.abc import Callable

from bitwatt_kernels.backend import MeasuresMemory

from bitwatt.engine.messages import Roofline
from bitwatt.model.transformer import Transformer

__all__ = ["MemoryTimer", "roofline_of"]

_READ_BYTES = 1 << 28  # fewer would be read from the caches of large processors
_NUM_LOOKS = 4
_PASSES_A_LOOK = 3


def roofline_of(model: Transformer, *, speculates: bool) -> Roofline:
    """Return what a step reads, and why that can't be held against memory's rate, if so.

    speculates  whether a step may bring a request several tokens, so that their rate isn't steps'
    """
    backend = model.backend
    unavailable = None
    if speculates:
        unavailable = "drafts bring several tokens a step (--speculate)"
    elif not isinstance(backend, MeasuresMemory):
        unavailable = f"the backend {backend.name} doesn't time its memory"
    return Roofline(step_bytes=model.memory().step_bytes, unavailable=unavailable)


class _WantedError(Exception):
    """Somebody waits for the engine."""


class MemoryTimer:
    """Times memory in the idle moments of an engine's first seconds, a tenth of a second at a time.

    While engines load, and where a neighbour is busy, memory seems slower than it is: the best of
    looks that lie apart counts. What is read is written before, and let go after each look: pages
    that nothing was ever written to, as most of an idle engine's KV cache, are all one page. A look
    that someone waits for is given up, and done another time.

    read_bytes_per_s  what came out; None before all looks are done
    """

    def __init__(self, model: Transformer, roofline: Roofline) -> None:
        self.read_bytes_per_s: float | None = None
        self._backend = model.backend
        self._num_left = _NUM_LOOKS if roofline.unavailable is None else 0
        self._best = 0.0

    def look(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Look once more, if need be; only while no step runs.

        is_wanted  whether somebody waits for the engine; asked every some milliseconds
        """
        if not self._num_left:
            return

        def check() -> None:
            if is_wanted():
                raise _WantedError

        assert isinstance(self._backend, MeasuresMemory)
        try:
            rate = self._backend.measure_read_bandwidth(
                _READ_BYTES, num_passes=_PASSES_A_LOOK, check=check
            )
        except _WantedError:
            return
        self._best = max(self._best, rate)
        self._num_left -= 1
        if not self._num_left:
            self.read_bytes_per_s = self._best
