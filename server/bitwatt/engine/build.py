"""Builds an engine from its configuration: model, KV cache, scheduler, runner."""

import time
from functools import partial
from pathlib import Path

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, Backend
from bitwatt_kernels.errors import BackendError, KernelError, ShapeError
from bitwatt_kernels.registry import BACKENDS, BackendChoice, choose_backend

from bitwatt.checkpoints.quantized import QUANTIZED
from bitwatt.checkpoints.registry import load_model
from bitwatt.engine.core import EngineCore
from bitwatt.engine.fake import build_fake_engine
from bitwatt.engine.messages import EngineConfig, EngineInfo, MemoryUse, Roofline
from bitwatt.engine.roofline import MemoryTimer, roofline_of
from bitwatt.engine.scheduler import new_scheduler
from bitwatt.engine.warm_up import warm_up
from bitwatt.errors import ConfigurationError, EngineStartError, shorten
from bitwatt.model.config import Dtype
from bitwatt.model.gpu_memory import kv_cache_budget, working_bytes
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.processors import cpu_name

__all__ = [
    "DEFAULT_CPU_KV_CACHE_BYTES",
    "DTYPES",
    "build_engine",
    "kv_cache_dtype",
    "plan_kv_cache",
]

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
        return build_fake_engine(config) if config.backend == "fake" else _build(config)
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
    cache_dtype = kv_cache_dtype(config, choice.backend.name)
    model = load_model(
        Path(config.model_path),
        weights=config.weights,
        backend=choice.backend,
        dtype=DTYPES[config.dtype],
        max_model_len=config.max_model_len,
        head_bits=config.head_bits,
        quantize=config.quantize,
    )
    kv_cache, max_model_len = _make_kv_cache(config, model, cache_dtype)
    on_gpu = choice.backend.device.type == "cuda"
    scheduler = new_scheduler(config, kv_cache.num_blocks, BLOCK_SIZE, max_model_len, on_gpu=on_gpu)
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.tokens_a_step(on_gpu=on_gpu),
        max_model_len=max_model_len,
    )
    roofline = roofline_of(model, speculates=config.speculate == "ngram")
    timer = MemoryTimer(model, roofline)
    warm_up(runner, new_scheduler(config, kv_cache.num_blocks, BLOCK_SIZE, max_model_len))
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
        persistent_step=config.persistent_step and config.weights == "ternary",
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return choose(device)
    except BackendError as error:
        is_open = config.device == "auto" and config.backend is None and not config.persistent_step
        if device.type != "cuda" or not is_open:
            raise
        choice = choose(torch.device("cpu"))
        return BackendChoice(choice.backend, {"cuda": str(error)} | choice.passed_over)


def _device(name: str) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise EngineStartError(f"device is {name!r}; torch sees {num_gpus} GPUs (--device)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def kv_cache_dtype(config: EngineConfig, backend: str) -> torch.dtype:
    """Return what keys and values are kept in.

    Raises  ConfigurationError where the backend of that name can't
    """
    asked = config.kv_cache_dtype
    if asked == "auto" or asked == config.dtype:
        return DTYPES[config.dtype]
    if asked == "int8":
        return torch.int8
    if backend == "triton":
        raise ConfigurationError(
            f"kv_cache_dtype is {asked!r}; the triton backend keeps keys and values in the dtype "
            f"of activations, {config.dtype}, or in int8 (--kv-cache-dtype)"
        )
    return DTYPES[asked]


def _make_kv_cache(
    config: EngineConfig, model: Transformer, dtype: torch.dtype
) -> tuple[KVCache, int]:
    """Return the cache and the context; see plan_kv_cache."""
    num_bytes = _kv_cache_bytes(config, model)
    num_blocks, max_model_len = plan_kv_cache(config, model, dtype, num_bytes)
    kv_cache = KVCache(model.config, num_blocks, dtype, model.backend.device)
    kv_cache.layers.zero_()  # takes the memory now; growing into it for hours would look a leak
    return kv_cache, max_model_len


def plan_kv_cache(
    config: EngineConfig, model: Transformer, dtype: torch.dtype, num_bytes: int | None
) -> tuple[int, int]:
    """Return the blocks of the cache, and the context.

    That is shortened where neither of the two was asked for.

    dtype      of keys and values
    num_bytes  at most; None for as many as all sequences at full length take
    Raises     EngineStartError where the cache holds no sequence of full length, or dtype isn't for
               the model's heads
    """
    max_model_len = model.config.max_model_len
    try:
        bytes_per_block = KVCache.bytes_per_block(model.config, dtype)
    except ShapeError as error:
        raise EngineStartError(f"{error} (--kv-cache-dtype)") from error
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
        max_num_batched_tokens=config.tokens_a_step(on_gpu=True),
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
        device_name=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        num_threads=None if is_cuda else _num_threads(choice.backend),
        instruction_set=getattr(choice.backend, "instruction_set", None),
        dtype=config.dtype,
        kv_cache_dtype=str(kv_cache.layers.dtype).removeprefix("torch."),
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
        linear_bytes=memory.linear_bytes,
        device_uuid=_board(device) if is_cuda else None,
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


def _board(device: torch.device) -> str:
    """Return by what the driver knows a GPU: NVIDIA's UUID, or the PCI address of one of AMD's."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return str(properties.uuid)
    domain, bus, slot = (getattr(properties, f"pci_{n}_id") for n in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def _num_threads(backend: Backend) -> int:
    """Return the threads of the backend's own, or torch's where it has none."""
    own: int | None = getattr(backend, "num_threads", None)
    return torch.get_num_threads() if own is None else own


def _fallback(choice: BackendChoice) -> str | None:
    """Return what runs in place of a faster backend, and why; None where nothing is faster."""
    if not choice.passed_over:
        return None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
    return (
        f"the backend {choice.backend.name} runs, and shows nothing of the speed that ternary "
        f"weights bring; passed over was {reasons}"
    )
