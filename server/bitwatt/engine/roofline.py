"""What bounds an engine's decoding: the weights a step reads, and how fast memory gives them."""

from bitwatt_kernels.backend import MeasuresMemory

from bitwatt.engine.messages import Roofline
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.transformer import Transformer

__all__ = ["MemoryTimer", "roofline_of"]

_MIN_BYTES = 1 << 27  # fewer would be read from the caches of large processors
_MAX_BYTES = 1 << 28
_NUM_LOOKS = 6
_PASSES_A_LOOK = 2


def roofline_of(model: Transformer, kv_cache: KVCache, *, speculates: bool) -> Roofline:
    """Return what a step reads, and why that can't be held against memory's rate, if so.

    speculates  whether a step may bring a request several tokens, so that their rate isn't steps'
    """
    backend = model.backend
    unavailable = None
    if speculates:
        unavailable = "drafts bring several tokens a step (--speculate)"
    elif not isinstance(backend, MeasuresMemory):
        unavailable = f"the backend {backend.name} doesn't time its memory"
    elif kv_cache.nbytes < _MIN_BYTES:
        unavailable = (
            f"memory is timed on the KV cache, and one of {kv_cache.nbytes / 1e6:.3g} MB is too "
            f"small for it: {_MIN_BYTES / 1e6:.0f} MB are needed (--kv-cache-bytes)"
        )
    return Roofline(step_bytes=model.memory().step_bytes, unavailable=unavailable)


class MemoryTimer:
    """Times memory in the idle moments of an engine's first seconds, milliseconds at a time.

    While engines load, and where a neighbour is busy, memory seems slower than it is: the best of
    looks that lie apart counts. The KV cache is what gets read, so that nothing more is held.

    read_bytes_per_s  what came out; None before all looks are done
    """

    def __init__(self, model: Transformer, kv_cache: KVCache, roofline: Roofline) -> None:
        self.read_bytes_per_s: float | None = None
        self._backend = model.backend
        self._buffer = kv_cache.layers.view(-1)[: _MAX_BYTES // kv_cache.layers.itemsize]
        self._num_left = _NUM_LOOKS if roofline.unavailable is None else 0
        self._best = 0.0

    def look(self) -> None:
        """Look once more, if need be; only while no step runs."""
        if not self._num_left:
            return
        assert isinstance(self._backend, MeasuresMemory)
        rate = self._backend.read_bandwidth(self._buffer, num_passes=_PASSES_A_LOOK)
        self._best = max(self._best, rate)
        self._num_left -= 1
        if not self._num_left:
            self.read_bytes_per_s = self._best
