"""Builds an engine from its configuration: model, KV cache, scheduler, runner."""

import platform
import time
from functools import partial
from pathlib import Path

import torch
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.errors import BackendError, KernelError
from bitwatt_kernels.registry import BACKENDS, BackendChoice, choose_backend

from bitwatt.checkpoints.files import read_json
from bitwatt.checkpoints.gguf import GgufCheckpoint
from bitwatt.checkpoints.gguf_file import is_gguf
from bitwatt.checkpoints.quantized import QUANTIZED
from bitwatt.checkpoints.registry import load_model
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import EngineConfig, EngineInfo, MemoryUse, Roofline
from bitwatt.engine.roofline import MemoryTimer, roofline_of
from bitwatt.errors import CheckpointError, ConfigurationError, EngineStartError, shorten
from bitwatt.model.config import Dtype
from bitwatt.model.fake_runner import FAKE_HIDDEN_SIZE, FakeRunner
from bitwatt.model.gpu_memory import kv_cache_budget, working_bytes
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["DEFAULT_CPU_KV_CACHE_BYTES", "DTYPES", "build_engine", "plan_kv_cache"]

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
_MIN_DEFAULT_MODEL_LEN = 2048  # a context is not shortened further
DTYPES: dict[Dtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def build_engine(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Return a core ready to step, and what it says of itself.

    Raises  ConfigurationError, CheckpointError or EngineStartError with the reason and the knob
    """
    try:
        return _build_fake(config) if config.backend == "fake" else _build(config)
    except KernelError as error:
        raise EngineStartError(str(error)) from error


def _build(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    started = time.monotonic()
    if config.backend is not None and config.backend not in BACKENDS:
        raise ConfigurationError(
            f"backend is {shorten(config.backend)}; it is one of {', '.join(BACKENDS)}, fake "
            "(--backend)"
        )
    choice = _choose_backend(config)
    model = load_model(
        Path(config.model_path),
        weights=config.weights,
        backend=choice.backend,
        dtype=DTYPES[config.dtype],
        max_model_len=config.max_model_len,
        head_bits=config.head_bits,
        quantize=config.quantize,
    )
    kv_cache, max_model_len = _make_kv_cache(config, model)
    scheduler = _make_scheduler(config, kv_cache.num_blocks, max_model_len)
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    roofline = roofline_of(model, kv_cache, speculates=config.speculate == "ngram")
    timer = MemoryTimer(model, kv_cache, roofline)
    core = EngineCore(
        scheduler, runner, eos_token_ids=model.config.eos_token_ids, memory_timer=timer
    )
    load_s = time.monotonic() - started
    return core, _describe(config, choice, model, kv_cache, max_model_len, load_s, roofline)


def _choose_backend(config: EngineConfig) -> BackendChoice:
    """Return what runs; of a device left open, a GPU that no backend can use gives way to the CPU.

    A GPU becomes torch's current one, on which streams, graphs and pinned memory are made.
    """
    device = _device(config.device)
    choose = partial(
        choose_backend,
        name=config.backend,
        batch_invariant=config.batch_invariant or config.weights == "ternary",
        num_threads=config.num_threads,
        instruction_set=config.cpu_isa,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return choose(device)
    except BackendError as error:
        if device.type != "cuda" or config.device != "auto" or config.backend is not None:
            raise
        choice = choose(torch.device("cpu"))
        return BackendChoice(choice.backend, {"cuda": str(error)} | choice.passed_over)


def _build_fake(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Return an engine that does everything but arithmetic, for a model's vocabulary."""
    vocab_size = _vocab_size(Path(config.model_path))
    max_model_len = config.max_model_len or 4096
    num_blocks = config.max_num_seqs * -(-max_model_len // BLOCK_SIZE)
    scheduler = _make_scheduler(config, num_blocks, max_model_len)
    no_memory = MemoryUse(
        packed_weights_bytes=0, embedding_bytes=0, other_weights_bytes=0, kv_cache_bytes=0
    )
    info = EngineInfo(
        weights=config.weights,
        backend="fake",
        device="none",
        device_name="none",
        dtype="none",
        num_parameters=0,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=[],
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        memory=no_memory,
        hidden_size=FAKE_HIDDEN_SIZE,
        notices=["the fake backend draws meaningless tokens"],
    )
    return EngineCore(scheduler, FakeRunner(vocab_size)), info


def _vocab_size(path: Path) -> int:
    if is_gguf(path):
        return GgufCheckpoint(path).config.vocab_size
    config_path = path / "config.json"
    vocab_size = read_json(config_path).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{config_path}: vocab_size is {vocab_size!r}; expected int")
    return vocab_size


def _make_scheduler(config: EngineConfig, num_blocks: int, max_model_len: int) -> Scheduler:
    return Scheduler(
        BlockAllocator(num_blocks, BLOCK_SIZE, prefix_caching=config.prefix_caching),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=_max_num_batched_tokens(config),
        max_model_len=max_model_len,
        speculates=config.speculate == "ngram",
    )


def _max_num_batched_tokens(config: EngineConfig) -> int:
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigurationError(
            f"a step has {config.max_num_batched_tokens} tokens (--max-num-batched-tokens); "
            f"every one of {config.max_num_seqs} running requests wants one (--max-num-seqs)"
        )
    return config.max_num_batched_tokens


def _device(name: str) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise EngineStartError(f"device is {name!r}; torch sees {num_gpus} NVIDIA GPUs (--device)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _make_kv_cache(config: EngineConfig, model: Transformer) -> tuple[KVCache, int]:
    """Return the cache and the context; see plan_kv_cache."""
    num_bytes = _kv_cache_bytes(config, model)
    num_blocks, max_model_len = plan_kv_cache(config, model, num_bytes)
    kv_cache = KVCache(model.config, num_blocks, model.dtype, model.backend.device)
    kv_cache.layers.zero_()  # takes the memory now; growing into it for hours would look a leak
    return kv_cache, max_model_len


def plan_kv_cache(
    config: EngineConfig, model: Transformer, num_bytes: int | None
) -> tuple[int, int]:
    """Return the blocks of the cache, and the context.

    That is shortened where neither of the two was asked for.

    num_bytes  at most; None for as many as all sequences at full length take
    Raises     EngineStartError where the cache holds no sequence of full length
    """
    max_model_len = model.config.max_model_len
    bytes_per_block = KVCache.bytes_per_block(model.config, model.dtype)
    num_blocks = config.max_num_seqs * -(-max_model_len // BLOCK_SIZE)
    if num_bytes is not None:
        num_blocks = min(num_blocks, num_bytes // bytes_per_block)
    num_tokens = num_blocks * BLOCK_SIZE
    is_default = config.max_model_len is None and config.kv_cache_bytes is None
    if is_default and _MIN_DEFAULT_MODEL_LEN <= num_tokens < max_model_len:
        max_model_len = num_tokens
    if num_tokens < max_model_len:
        raise EngineStartError(
            f"the KV cache holds {num_tokens} tokens; one sequence may have "
            f"{max_model_len}: raise --kv-cache-bytes "
            f"(a token takes {bytes_per_block // BLOCK_SIZE} bytes) or lower --max-model-len"
        )
    return num_blocks, max_model_len


def _kv_cache_bytes(config: EngineConfig, model: Transformer) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if model.backend.device.type != "cuda":
        return DEFAULT_CPU_KV_CACHE_BYTES
    torch.cuda.empty_cache()  # what loading has freed counts as used until then
    free, total = torch.cuda.mem_get_info(model.backend.device)
    working = working_bytes(
        model.config,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=model.config.max_model_len,
    )
    return kv_cache_budget(
        total=total,
        free=free,
        own=torch.cuda.memory_reserved(model.backend.device),
        working=working,
        utilization=config.gpu_memory_utilization,
        num_engines=config.num_engines_per_gpu,
    )


def _describe(
    config: EngineConfig,
    choice: BackendChoice,
    model: Transformer,
    kv_cache: KVCache,
    max_model_len: int,
    load_s: float,
    roofline: Roofline,
) -> EngineInfo:
    device = choice.backend.device
    is_cuda = device.type == "cuda"
    memory = model.memory()
    fallback = _fallback(choice)
    notices = [*([] if fallback is None else [fallback]), *model.notices]
    if max_model_len < model.config.max_model_len:
        notices.append(
            f"the context is {max_model_len} tokens of the model's {model.config.max_model_len}, "
            "as many as the KV cache holds (--max-model-len and --kv-cache-bytes set others)"
        )
    return EngineInfo(
        weights=config.weights,
        backend=choice.backend.name,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        dtype=config.dtype,
        num_parameters=memory.num_parameters,
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=list(model.config.eos_token_ids),
        num_blocks=kv_cache.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        memory=MemoryUse(
            packed_weights_bytes=memory.packed_weights_bytes,
            embedding_bytes=memory.embedding_bytes,
            other_weights_bytes=memory.other_weights_bytes,
            kv_cache_bytes=kv_cache.nbytes,
            device_total_bytes=torch.cuda.mem_get_info(device)[1] if is_cuda else None,
        ),
        device_uuid=str(torch.cuda.get_device_properties(device).uuid) if is_cuda else None,
        num_linear_parameters=model.config.num_linear_parameters,
        num_layers=model.config.num_layers,
        attention_width=model.config.num_heads * model.config.head_dim,
        hidden_size=model.config.hidden_size,
        notices=notices,
        fallback=fallback,
        load_s=load_s,
        quantized=QUANTIZED if config.quantize else None,
        roofline=roofline,
    )


def _fallback(choice: BackendChoice) -> str | None:
    """Return what runs in place of a faster backend, and why; None where nothing is faster."""
    if not choice.passed_over:
        return None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
    return (
        f"the backend {choice.backend.name} runs, and shows nothing of the speed that ternary "
        f"weights bring; passed over was {reasons}"
    )
