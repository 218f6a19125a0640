"""The scheduler that a configuration asks for."""

from bitwatt.engine.messages import EngineConfig
from bitwatt.errors import ConfigurationError
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["new_scheduler"]


def new_scheduler(
    config: EngineConfig,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    *,
    on_gpu: bool = False,
) -> Scheduler:
    """Return a scheduler over so many blocks of so many tokens.

    Raises  ConfigurationError where a step is too small for the requests that may run
    """
    max_num_batched_tokens = config.tokens_a_step(on_gpu=on_gpu)
    if max_num_batched_tokens < config.max_num_seqs:
        raise ConfigurationError(
            f"a step has {max_num_batched_tokens} tokens (--max-num-batched-tokens); "
            f"every one of {config.max_num_seqs} running requests wants one (--max-num-seqs)"
        )
    return Scheduler(
        BlockAllocator(num_blocks, block_size, prefix_caching=config.prefix_caching),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        speculates=config.speculate == "ngram",
    )
