"""Runs the steps of a plan: a forward pass over what is staged, and the draws of its next tokens.

launch() returns before the device is done, so that the host can plan the next step meanwhile;
steps run in the order they were launched. A pending token, sampled by a step the host has not
seen the end of, is fed from the device's own copy.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from torch import Tensor

from bitwatt.model.embedding import embed
from bitwatt.model.graphs import DecodeGraphs, compile_together, feed
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_graphs import PromptGraphs
from bitwatt.model.prompt_scoring import Scores, score
from bitwatt.model.runner_protocol import StepResult, StepResultHandle
from bitwatt.model.sampler import Sampler, SamplingRow, TokenDrawer
from bitwatt.model.staging import StagedStep, Staging
from bitwatt.model.step_buffers import DeviceStep, StepFields
from bitwatt.model.step_masks import StepMasks
from bitwatt.model.step_results import StepOutputs, fetch, fetch_sampled, fetch_scores
from bitwatt.model.step_thread import StepThread
from bitwatt.model.streams import CudaStream, Event, Stream
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import ResolvedSampling

__all__ = ["ModelRunner", "warm_up_sizes"]


class _Handle:
    def __init__(self, future: Future[StepResult]) -> None:
        self._future = future

    def wait(self) -> StepResult:
        return self._future.result()


class _DeviceHandle:
    def __init__(self, collect: Callable[[], StepResult], is_done: Event) -> None:
        self._collect = collect
        self._is_done = is_done

    def wait(self) -> StepResult:
        # Even where there is nothing to collect: the step's time, and its buffers, end with it.
        self._is_done.synchronize()
        return self._collect()


class ModelRunner:
    """Runs a transformer over its own paged KV cache.

    Not thread-safe; one launch at a time. On a CPU the step runs in a thread of its own, on a
    GPU it is queued on the stream.
    """

    def __init__(
        self,
        model: Transformer,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        stream: Stream | None = None,
    ) -> None:
        """Begin with what captures and compiles.

        stream  of the model's device; None for the current one of a GPU, and for none on a CPU
        """
        self._model = model
        self._kv_cache = kv_cache
        self._device = model.backend.device
        self.vocab_size = model.config.vocab_size
        self._max_blocks = -(-max_model_len // BLOCK_SIZE)
        if stream is None and self._device.type != "cpu":
            stream = CudaStream()
        self._stream = stream
        limits = (max_num_seqs, max_num_batched_tokens, self._max_blocks)
        self._masks = StepMasks(model.backend, stream)
        self._staging = Staging(*limits, stream, self._masks)
        self._device_step = None if stream is None else DeviceStep(*limits, self._device)
        drawer = model.backend if isinstance(model.backend, TokenDrawer) else None
        self._sampler = Sampler(max_num_seqs, self.vocab_size, self._device, drawer)
        self._last_tokens = (
            torch.zeros(max_num_seqs, dtype=torch.int64)
            if self._device_step is None
            else self._device_step.last_tokens
        )
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        self._thread: StepThread | None = None
        if self._device_step is None:
            self._thread = StepThread()
        elif self._device.type == "cuda":
            shared = (model, kv_cache, self._device_step)
            self._graphs = DecodeGraphs(
                *shared, max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
            self._prompt_graphs = PromptGraphs(
                *shared,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
            )
            self._warm_up(warm_up_sizes(max_num_batched_tokens), max_model_len)
            torch.cuda.synchronize(self._device)

    def launch(self, plan: Plan) -> StepResultHandle:
        step = self._staging.stage(plan)
        if self._thread is not None:
            return _Handle(self._thread.submit(lambda then: self._run(step, then)))
        assert self._stream is not None
        collect = self._execute(step)
        return _DeviceHandle(collect, self._stream.record())

    def _warm_up(self, sizes: Sequence[int], max_model_len: int) -> None:
        """Compile what eager steps of these sizes need, and what draws."""
        prompts = [partial(self._run_prompts, size, max_model_len) for size in sizes]
        calls: list[Callable[[], object]] = [*prompts, self._draw_one]
        compile_together(self._model.backend, calls)
        for call in calls:
            call()

    def _draw_one(self) -> None:
        logits = torch.zeros(1, self.vocab_size, dtype=torch.float32, device=self._device)
        row = SamplingRow(0, 0, 0, ResolvedSampling(max_tokens=1, temperature=1.0))
        self._sampler.sample(logits, [row])

    @torch.inference_mode()
    def _run_prompts(self, num_tokens: int, max_model_len: int) -> None:
        """Run a step of prompts that leaves no trace, to compile what steps of its size need."""
        num_seqs = -(-num_tokens // max_model_len)
        starts = torch.tensor([min(i * max_model_len, num_tokens) for i in range(num_seqs + 1)])
        context_lens = starts.diff()
        layout = StepLayout(
            positions=(torch.arange(num_tokens) % max_model_len).to(self._device),
            slots=torch.full((num_tokens,), -1, device=self._device),
            query_starts=starts.int().to(self._device),
            context_lens=context_lens.int().to(self._device),
            block_tables=torch.zeros(
                num_seqs, self._max_blocks, dtype=torch.int32, device=self._device
            ),
            max_query_len=int(context_lens.max()),
            max_context_len=int(context_lens.max()),
        )
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
        self._model.forward(token_ids, layout, self._kv_cache, starts[1:].to(self._device) - 1)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
        self._masks.close()

    def _run(self, step: StagedStep, deliver: Callable[[], None]) -> StepResult:
        """Run a CPU's step; beside its layers, deliver the one before and have its masks made."""

        def before_layers() -> None:
            self._masks.take_what_came()
            deliver()

        return self._execute(step, before_layers)()

    @torch.inference_mode()
    def _execute(
        self, step: StagedStep, before_layers: Callable[[], None] | None = None
    ) -> Callable[[], StepResult]:
        """Queue the step on the device; the returned call makes the result of what has come."""
        has_prompt_graph = self._pad(step)
        fields = self._fields_of(step)
        layout = step.layout(fields)
        num_drawn = len(step.sampling_rows)
        for begin in step.penalized:
            self._sampler.begin(begin.row, begin.prompt, begin.outputs)
        trials = self._masks.try_drafts(step.masked)
        logit_tokens = fields.logit_tokens[:num_drawn]
        scores: list[Scores] = []
        embedded: Tensor | None = None
        drawn: Tensor | None = None
        if self._graphs is not None and step.is_decode:
            logits, drawn = self._graphs.forward(step.num_seqs, layout.block_tables)
        else:
            if step.num_pending:
                feed(fields, step.num_pending, self._last_tokens)
            if has_prompt_graph and self._prompt_graphs is not None:
                h = self._prompt_graphs.hidden_states(step.num_tokens, layout.block_tables)
            else:
                h = self._model.hidden_states(
                    fields.token_ids[: step.num_tokens],
                    layout,
                    self._kv_cache,
                    before_layers=before_layers,
                )
            logits = self._model.logits(h, logit_tokens)
            if step.scored:
                scores = score(self._model, h, step.scored)
            if step.embedded:
                embedded = fetch(embed(self._model, h, step.embedded), self._stream)
        scores = [fetch_scores(some, self._stream) for some in scores]
        sampled = None
        if num_drawn:
            constraints = step.masked.constraints
            masks = self._masks.masks_of(step.masked, trials) if constraints else None
            settings = fields.draws[:num_drawn]
            sampled = self._sampler.sample(logits, step.sampling_rows, masks, settings, drawn)
            # A step planned before this one's end feeds even a token that wasn't drawn: as a 0, to
            # a request that has ended by then. Of a request with drafts it feeds none.
            if sampled.tokens is not drawn:
                self._last_tokens[fields.sampling_rows[:num_drawn]] = sampled.tokens.clamp(min=0)
            sampled = fetch_sampled(sampled, self._stream)
            if constraints:
                self._masks.follow(step.masked, sampled.tokens)
        return StepOutputs(sampled, step.sampling_rows, scores, embedded).collect

    def _pad(self, step: StagedStep) -> bool:
        """Fill what is staged up to the size of the graph that runs it, before it is copied.

        Returns whether that is one of prompts.
        """
        fields = step.host.fields
        if self._graphs is not None and step.is_decode:
            self._graphs.pad(fields, step.num_seqs, step.num_pending)
        elif self._prompt_graphs is not None:
            return self._prompt_graphs.pad(fields, step.num_tokens, step.num_seqs)
        return False

    def _fields_of(self, step: StagedStep) -> StepFields:
        """Return the step's numbers where the device reads them."""
        if self._stream is None or self._device_step is None:
            return step.host.fields
        self._device_step.take(step.host, step.num_seqs * step.num_blocks, self._stream)
        return self._device_step.fields


def warm_up_sizes(max_num_batched_tokens: int) -> list[int]:
    """Return numbers of a step's tokens for which one at least meets every compiled variant.

    Which tile a kernel has, and whether its sum is split, changes with the number of tokens.
    """
    sizes = [1, 2, 9, 17, 33, 65, 129, 257, 385, 513, 769, 1025, 1537, 2049, 4097, 8193]
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]
