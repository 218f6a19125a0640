"""The KV cache's shape and size."""

import torch
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS


def test_a_block_takes_what_the_cache_takes_a_block() -> None:
    config = PRESETS["2B4T"]
    cache = KVCache(config, 7, torch.bfloat16, torch.device("cpu"))
    assert cache.layers.shape == (30, 2, 7, 5, 16, 128)
    assert cache.nbytes == 7 * KVCache.bytes_per_block(config, torch.bfloat16)
    assert KVCache.bytes_per_block(config, torch.bfloat16) == 16 * 76800  # 75 KiB a token


def test_in_int8_a_head_of_a_token_takes_a_byte_a_value_and_four_of_its_scale() -> None:
    config = PRESETS["2B4T"]
    cache = KVCache(config, 7, torch.int8, torch.device("cpu"))
    assert cache.nbytes == 7 * KVCache.bytes_per_block(config, torch.int8)
    assert KVCache.bytes_per_block(config, torch.int8) == 16 * 2 * 30 * 5 * (128 + 4)
