"""One model of cpu.py in a process of its own: `python -m bitwatt.bench.cpu_child CONFIG`.

Prints what it is as a line of JSON, then answers each line of standard input with a measurement,
until the input ends:

    decode N    a step of N sequences with some context each, 128 tokens by default
    prefill N   a prompt of N tokens, to its first token
    generate N  N tokens one after the other, from a prompt of one
"""

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypedDict

import torch
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.cpu.native_backend import NativeBackend

from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.engine.process_memory import rss_anon_bytes
from bitwatt.model.config import HeadBits, ModelConfig, Weights
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS
from bitwatt.model.random_weights import random_model
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["ChildConfig", "Measurement", "Model"]

_DTYPE = torch.bfloat16
_STEP_TOKENS = 512
_STEPS = 8  # timed together
_WARMUP_STEPS = 3
_SEED = 0


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """What to make: a preset's shape, or its first layers.

    num_threads  None takes all cores the process may use
    cpu_isa      instruction set of the kernels; None takes the fastest that runs
    read_bytes   what the rate of memory is measured on; far more than the caches hold
    max_batch    sequences at once, for which there is a KV cache
    context_tokens  of each sequence of a decode step
    max_prompt_tokens  of a prompt that is prefilled
    kv_cache_dtype  of keys and values
    group        ternary weights that share a scale; None for all of a row
    has_ternary_head  embedding and head are ternary too
    """

    preset: str
    num_layers: int
    weights: Weights
    head_bits: HeadBits
    num_threads: int | None = None
    cpu_isa: str | None = None
    read_bytes: int = 1 << 28
    max_batch: int = 8
    context_tokens: int = 128
    max_prompt_tokens: int = 512
    kv_cache_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    group: int | None = None
    has_ternary_head: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """What was made, ready to serve.

    step_bytes         what a decode step reads of the weights
    rss_anon_bytes     of the process with the KV cache of its batch; None where unknown
    """

    instruction_set: str
    num_threads: int
    made_s: float
    weights_bytes: int
    step_bytes: int
    rss_anon_bytes: int | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of what was asked for, and what memory gave just before."""

    seconds: float
    read_bytes_per_s: float


class _Child:
    def __init__(self, options: ChildConfig) -> None:
        config = replace(
            PRESETS[options.preset],
            num_layers=options.num_layers,
            max_model_len=_longest(options) + BLOCK_SIZE,
        )
        # The baseline runs as fast as its library can.
        is_exact = options.weights == "ternary"
        self.backend = NativeBackend(
            torch.device("cpu"),
            batch_invariant=is_exact,
            num_threads=options.num_threads,
            instruction_set=options.cpu_isa,
        )
        torch.set_num_threads(self.backend.num_threads)
        started = time.perf_counter()
        model = random_model(
            config,
            weights=options.weights,
            backend=self.backend,
            dtype=_DTYPE,
            seed=_SEED,
            head_bits=options.head_bits,
            group=options.group,
            has_ternary_head=options.has_ternary_head,
        )
        made_s = time.perf_counter() - started
        self.config = config
        self.options = options
        self.core = _make_core(model, config, options)
        gc.collect()
        gc.freeze()  # as an engine process does; what it ends with isn't looked through either
        memory = model.memory()
        linear_bytes = memory.packed_weights_bytes + memory.other_weights_bytes
        head_bytes = config.vocab_size * config.hidden_size * options.head_bits // 8
        if options.has_ternary_head:
            head_bytes = memory.embedding_bytes // (1 if config.is_tied else 2)
        self.model = Model(
            instruction_set=self.backend.instruction_set,
            num_threads=self.backend.num_threads,
            made_s=made_s,
            weights_bytes=linear_bytes + memory.embedding_bytes,
            step_bytes=linear_bytes + head_bytes,
            rss_anon_bytes=rss_anon_bytes(),
        )
        self._num_submitted = 0

    def measure(self, kind: str, count: int) -> Measurement:
        read_bytes_per_s = self.backend.measure_read_bandwidth(self.options.read_bytes)
        match kind:
            case "decode":
                seconds = self._decode(count)
            case "prefill":
                seconds = self._run(num_prompt_tokens=count, max_tokens=1)
            case "generate":
                seconds = self._run(num_prompt_tokens=1, max_tokens=count)
            case _:
                raise ValueError(f"{kind!r} is not decode, prefill or generate")
        return Measurement(seconds, read_bytes_per_s)

    def _decode(self, batch: int) -> float:
        """Return the seconds of an engine's decode step of so many sequences."""
        num_steps = _WARMUP_STEPS + _STEPS
        num_prompt_tokens = self.options.context_tokens - num_steps // 2
        ids = [self._submit(num_prompt_tokens, num_steps + 2) for _ in range(batch)]
        num_first_tokens = 0
        while num_first_tokens < batch:
            num_first_tokens += len(self.core.step())
        for _ in range(_WARMUP_STEPS):
            self.core.step()
        started = time.perf_counter()
        for _ in range(_STEPS):
            self.core.step()
        seconds = time.perf_counter() - started
        self.core.abort(ids)
        while self.core.has_work:
            self.core.step()
        return seconds / _STEPS

    def _run(self, num_prompt_tokens: int, max_tokens: int) -> float:
        """Return the seconds of one request, alone."""
        started = time.perf_counter()
        self._submit(num_prompt_tokens, max_tokens)
        while self.core.has_work:
            self.core.step()
        return time.perf_counter() - started

    def _submit(self, num_tokens: int, max_tokens: int) -> str:
        self._num_submitted += 1
        name = str(self._num_submitted)
        vocab_size = self.config.vocab_size
        prompt = [(31 * self._num_submitted + j) % vocab_size for j in range(num_tokens)]
        sampling = ResolvedSampling(max_tokens=max_tokens, temperature=0.0)
        self.core.submit(Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        return name


def _longest(options: ChildConfig) -> int:
    return max(options.max_prompt_tokens, options.context_tokens)


class _Limits(TypedDict):
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


def _make_core(model: Transformer, config: ModelConfig, options: ChildConfig) -> EngineCore:
    batch = options.max_batch
    num_tokens = batch * options.context_tokens + options.max_prompt_tokens
    num_blocks = num_tokens // BLOCK_SIZE + 2 * batch
    dtype = torch.int8 if options.kv_cache_dtype == "int8" else _DTYPE
    kv_cache = KVCache(config, num_blocks, dtype, model.backend.device)
    kv_cache.layers.zero_()  # resident from the start
    blocks = BlockAllocator(num_blocks, BLOCK_SIZE, prefix_caching=False)
    limits: _Limits = {
        "max_num_seqs": batch,
        "max_num_batched_tokens": _STEP_TOKENS,
        "max_model_len": config.max_model_len,
    }
    return EngineCore(
        Scheduler(blocks, **limits), ModelRunner(model, kv_cache, stream=None, **limits)
    )


def _say(answer: Model | Measurement) -> None:
    print(json.dumps(asdict(answer)), flush=True)


def main() -> None:
    """Make the model of the JSON given as the only argument, and answer until the input ends."""
    child = _Child(ChildConfig(**json.loads(sys.argv[1])))
    _say(child.model)
    for line in sys.stdin:
        kind, count = line.split()
        _say(child.measure(kind, int(count)))
    child.core.close()


if __name__ == "__main__":
    main()
