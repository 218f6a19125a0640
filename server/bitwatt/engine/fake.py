"""An engine that does everything but arithmetic. It starts at once, for it loads no PyTorch."""

from pathlib import Path

from bitwatt.checkpoints.files import read_json
from bitwatt.checkpoints.gguf_file import is_gguf
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import EngineConfig, EngineInfo, MemoryUse
from bitwatt.engine.scheduler import new_scheduler
from bitwatt.errors import CheckpointError
from bitwatt.model.fake_runner import FAKE_HIDDEN_SIZE, FakeRunner

__all__ = ["build_fake_engine"]

_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 4096


def build_fake_engine(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Return a core ready to step, for a model's vocabulary, and what it says of itself.

    Raises  ConfigurationError or CheckpointError with the reason
    """
    vocab_size = _vocab_size(Path(config.model_path))
    max_model_len = config.max_model_len or _MAX_MODEL_LEN
    num_blocks = config.max_num_seqs * -(-max_model_len // _BLOCK_SIZE)
    scheduler = new_scheduler(config, num_blocks, _BLOCK_SIZE, max_model_len)
    no_memory = MemoryUse(
        packed_weights_bytes=0, embedding_bytes=0, other_weights_bytes=0, kv_cache_bytes=0
    )
    info = EngineInfo(
        weights=config.weights,
        backend="fake",
        device="none",
        device_name="none",
        dtype="none",
        kv_cache_dtype="none",
        num_parameters=0,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=[],
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        memory=no_memory,
        hidden_size=FAKE_HIDDEN_SIZE,
        notices=["the fake backend draws meaningless tokens"],
    )
    return EngineCore(scheduler, FakeRunner(vocab_size)), info


def _vocab_size(path: Path) -> int:
    if is_gguf(path):
        from bitwatt.checkpoints.gguf import GgufCheckpoint  # loads PyTorch

        return GgufCheckpoint(path).config.vocab_size
    config_path = path / "config.json"
    vocab_size = read_json(config_path).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{config_path}: vocab_size is {vocab_size!r}; expected int")
    return vocab_size
