"""Serving on a GPU: scheduler, runner, captured graphs and sampler, as the engine drives them.

A step is launched before the one before it is waited for, and launching must not wait for the
device: torch raises where it does. What comes out is held to the model run eagerly over each whole
text at once, whose logits the same sampler draws from.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from bench.layer_ops import make_layout
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.gpu.timing import Timing

from bitwatt.model.kv_cache import KVCache
from bitwatt.model.runner import ModelRunner
from bitwatt.model.runner_protocol import StepResultHandle
from bitwatt.model.sampler import Sampler, SamplingRow, TokenDrawer
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["Server", "ServingLimits", "check_serving", "time_serving"]


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """The engine's limits of the same names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0},
)


@contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """Have torch raise where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True, slots=True)
class _StepTime:
    num_sequences: int
    is_decode: bool
    launch_s: float
    done_s: float  # when it was waited for, by time.perf_counter


class Server:
    """What an engine process has of a model, without the process."""

    def __init__(self, model: Transformer, limits: ServingLimits) -> None:
        self.model = model
        self.limits = limits
        num_blocks = limits.max_num_seqs * -(-limits.max_model_len // BLOCK_SIZE)
        device = model.backend.device
        kv_cache = KVCache(model.config, num_blocks, model.dtype, device)
        kv_cache.layers.zero_()
        self._scheduler = Scheduler(
            BlockAllocator(num_blocks, BLOCK_SIZE, prefix_caching=False),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
        )
        self._runner = ModelRunner(
            model,
            kv_cache,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
        )

    def run(self, requests: Sequence[Request]) -> list[_StepTime]:
        """Serve the requests to their ends; they hold their tokens then."""
        for request in requests:
            self._scheduler.add(request)
        times: list[_StepTime] = []
        flight: tuple[Plan, StepResultHandle, float] | None = None
        while self._scheduler.has_work or flight:
            plan = self._scheduler.plan()
            launched = None
            if plan.chunks:
                start = time.perf_counter()
                with _no_waits(self.model.backend.device):
                    handle = self._runner.launch(plan)
                launched = (plan, handle, time.perf_counter() - start)
            done, flight = flight, launched
            if done is not None:
                result = done[1].wait()
                chunks = done[0].chunks
                is_decode = all(chunk.num_tokens == 1 for chunk in chunks)
                times.append(_StepTime(len(chunks), is_decode, done[2], time.perf_counter()))
                if result.failures:
                    raise RuntimeError(f"tokens could not be drawn: {result.failures}")
                self._scheduler.commit(done[0], result.tokens)
        return times

    def close(self) -> None:
        self._runner.close()


def _prompt(length: int, start: int, vocab_size: int) -> list[int]:
    return [(7919 * (start + i)) % vocab_size for i in range(length)]


def check_serving(server: Server, prompts: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """Return how many tokens, served together, are those that the model gives each text alone.

    prompts  lengths, one a request; longer than max_num_batched_tokens are cut into chunks
    """
    vocab_size = server.model.config.vocab_size
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=_prompt(length, i, vocab_size),
            sampling=ResolvedSampling(
                max_tokens=max_tokens, seed=i, **_SAMPLINGS[i % len(_SAMPLINGS)]
            ),
        )
        for i, length in enumerate(prompts)
    ]
    times = server.run(requests)
    row: dict[str, Any] = {
        "num_requests": len(requests),
        "num_steps": len(times),
        "num_tokens": 0,
        "num_equal": 0,
        "differ": [],
    }
    for request in requests:
        drawn = request.tokens[len(request.prompt_token_ids) :]
        expected = _eager(server.model, request)
        equal = sum(a == b for a, b in zip(drawn, expected, strict=True))
        row["num_tokens"] += len(drawn)
        row["num_equal"] += equal
        if equal < len(drawn):
            first = next(i for i, (a, b) in enumerate(zip(drawn, expected, strict=True)) if a != b)
            row["differ"].append(
                {"request": request.request_id, "first": first, "tokens": len(drawn) - equal}
            )
    return row


@torch.inference_mode()
def _eager(model: Transformer, request: Request) -> list[int]:
    """Return the token drawn behind each prefix of the request's text, all in one forward pass."""
    device = model.backend.device
    tokens, num_prompt = request.tokens[:-1], len(request.prompt_token_ids)
    kv_cache = KVCache(model.config, -(-len(tokens) // BLOCK_SIZE), model.dtype, device)
    kv_cache.layers.zero_()
    layout = make_layout(1, len(tokens), len(tokens), model.config.max_model_len, device)
    logit_tokens = torch.arange(num_prompt - 1, len(tokens), device=device)
    logits = model.forward(torch.tensor(tokens, device=device), layout, kv_cache, logit_tokens)
    assert isinstance(model.backend, TokenDrawer)
    sampler = Sampler(1, model.config.vocab_size, device, model.backend)
    if request.sampling.has_penalties:
        sampler.begin(0, request.prompt_token_ids, [])
    drawn: list[int] = []
    for i in range(len(logits)):
        row = SamplingRow(0, num_prompt + i, i, request.sampling)
        drawn += sampler.sample(logits[i : i + 1].clone(), [row]).tokens.tolist()
    return drawn


def time_serving(
    server: Server,
    *,
    num_sequences: int,
    prompt_tokens: int,
    max_tokens: int,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """Return seconds a decode step takes with all that the host does for it, and the host's part.

    sampling  of every request, beside max_tokens and seed
    """
    vocab_size = server.model.config.vocab_size
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=_prompt(prompt_tokens, i, vocab_size),
            sampling=ResolvedSampling(max_tokens=max_tokens, seed=i, **sampling),
        )
        for i in range(num_sequences)
    ]
    times = server.run(requests)
    steps, launches = [], []
    for before, after in pairwise(times):
        full = (s.is_decode and s.num_sequences == num_sequences for s in (before, after))
        if all(full):
            steps.append(after.done_s - before.done_s)
            launches.append(after.launch_s)
    timing = Timing.of(steps)
    return {
        "num_sequences": num_sequences,
        "prompt_tokens": prompt_tokens,
        "sampling": sampling,
        "step": timing.to_dict(),
        "tokens_per_s": num_sequences / timing.median_s,
        "launch_s": statistics.median(launches),
    }
