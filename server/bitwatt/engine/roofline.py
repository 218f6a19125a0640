"""What bounds an engine's decoding: the weights a step reads, and how fast memory gives them."""

from bitwatt_kernels.backend import MeasuresMemory

from bitwatt.engine.messages import Roofline
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.transformer import Transformer

__all__ = ["roofline_of"]

_MIN_BYTES = 1 << 27  # fewer would be read from the caches of large processors
_MAX_BYTES = 1 << 28


def roofline_of(model: Transformer, kv_cache: KVCache, *, speculates: bool) -> Roofline:
    """Return it, with memory's rate where the backend measures one, in some 50 ms.

    kv_cache    is what gets read, so that nothing more has to be held; its pages were written to
    speculates  whether a step may bring a request several tokens, so that their rate isn't steps'
    """
    step_bytes = model.memory().step_bytes
    backend = model.backend
    if speculates:
        unavailable = "drafts bring several tokens a step (--speculate)"
    elif not isinstance(backend, MeasuresMemory):
        unavailable = f"the backend {backend.name} doesn't time its memory"
    elif kv_cache.nbytes < _MIN_BYTES:
        unavailable = (
            f"memory is timed on the KV cache, and one of {kv_cache.nbytes / 1e6:.3g} MB is too "
            f"small for it: {_MIN_BYTES / 1e6:.0f} MB are needed (--kv-cache-bytes)"
        )
    else:
        buffer = kv_cache.layers.view(-1)[: _MAX_BYTES // kv_cache.layers.itemsize]
        return Roofline(step_bytes=step_bytes, read_bytes_per_s=backend.read_bandwidth(buffer))
    return Roofline(step_bytes=step_bytes, unavailable=unavailable)
