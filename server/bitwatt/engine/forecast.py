"""What an engine will hold in memory, by its own planning, without the memory."""

from typing import cast

from bitwatt_kernels.backend import Backend

from bitwatt.engine.build import (
    DEFAULT_CPU_KV_CACHE_BYTES,
    DTYPES,
    kv_cache_dtype,
    plan_kv_cache,
)
from bitwatt.engine.messages import EngineConfig, MemoryUse
from bitwatt.model.build import build_transformer
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.sizes_only import SizesOnly
from bitwatt.model.tensor_source import TensorSource

__all__ = ["forecast"]


def forecast(source: TensorSource, config: EngineConfig) -> tuple[MemoryUse, int]:
    """Return what an engine of this configuration will report, and its context.

    On a GPU the KV cache is what all its requests take at full length, unless config has a number
    of bytes: what --gpu-memory-utilization leaves is known there alone.

    source   hands out tensors on torch's device "meta"
    config   with a backend's name
    Raises   ConfigurationError, CheckpointError or EngineStartError as the engine will
    """
    assert config.backend is not None
    cache_dtype = kv_cache_dtype(config, config.backend)
    model = build_transformer(
        source,
        weights=config.weights,
        backend=cast(Backend, SizesOnly(config.backend)),
        dtype=DTYPES[config.dtype],
        max_model_len=config.max_model_len,
        head_bits=config.head_bits,
    )
    num_bytes = config.kv_cache_bytes
    if num_bytes is None and config.backend != "triton":
        num_bytes = DEFAULT_CPU_KV_CACHE_BYTES
    num_blocks, max_model_len = plan_kv_cache(config, model, cache_dtype, num_bytes)
    memory = model.memory()
    use = MemoryUse(
        packed_weights_bytes=memory.packed_weights_bytes,
        embedding_bytes=memory.embedding_bytes,
        other_weights_bytes=memory.other_weights_bytes,
        kv_cache_bytes=num_blocks * KVCache.bytes_per_block(model.config, cache_dtype),
    )
    return use, max_model_len
