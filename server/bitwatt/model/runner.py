"""Turns a plan into a forward pass: stages its tokens, runs the model, draws the next tokens.

launch() returns before the device is done, so that the host can plan the next step meanwhile;
steps run in the order they were launched. A pending token, sampled by a step the host has not
seen the end of, is fed from the device's own copy.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.cpu.token_masks import MaskLane, MatcherCalls
from torch import Tensor

from bitwatt.constraints.constraint import Constraint, Trial
from bitwatt.constraints.masks import MaskThread
from bitwatt.model.embedding import embed, packed_embeddings
from bitwatt.model.graphs import DecodeGraphs, compile_together, feed
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_graphs import PromptGraphs
from bitwatt.model.prompt_scoring import ScoredRows, Scores, score
from bitwatt.model.runner_protocol import StepResult, StepResultHandle, TokenLogprobsRow
from bitwatt.model.sampler import (
    LogprobsBatch,
    Sampled,
    Sampler,
    SamplingRow,
    TokenDrawer,
    TokenMasks,
    drawing_settings,
)
from bitwatt.model.step_buffers import DeviceStep, HostStep, StepFields
from bitwatt.model.step_thread import StepThread
from bitwatt.model.streams import CudaStream, Event, Stream, upload
from bitwatt.model.transformer import Transformer
from bitwatt.model.truncation_sampling import NO_TOKEN
from bitwatt.scheduling.plan import Chunk, Plan
from bitwatt.scheduling.request import Request, ResolvedSampling

__all__ = ["ModelRunner", "warm_up_sizes"]

_NOT_FINITE = "the logits of its next token are not finite, so none can be drawn"


@dataclass(frozen=True, slots=True)
class _Penalized:
    """A request that begins, or resumes, to run and whose token counts matter."""

    row: int
    prompt: list[int]
    outputs: list[int]

    @classmethod
    def of(cls, chunk: Chunk) -> "_Penalized":
        prompt = chunk.request.prompt_token_ids
        return cls(chunk.row, prompt, chunk.request.tokens[len(prompt) :])


@dataclass(frozen=True, slots=True)
class _Step:
    """One staged step: its numbers, and how many there are of each."""

    host: HostStep
    num_tokens: int
    num_seqs: int
    num_pending: int
    num_blocks: int  # of a row of the tables
    max_query_len: int
    max_context_len: int
    is_decode: bool  # every sequence brings one token, and one is drawn behind each
    has_prompt_graph: bool
    sampling_rows: list[SamplingRow]
    constrained: dict[int, Constraint]  # by index among sampling_rows, of a chunk's first
    drafts: dict[int, Sequence[int]]  # of those chunks that have some, by the same index
    masked: list[int]  # indices among sampling_rows: those of constrained, and behind their drafts
    penalized: list[_Penalized]
    scored: Sequence[ScoredRows]
    embedded: Sequence[int]  # rows of the step's hidden states


@dataclass(frozen=True, slots=True)
class _DrawnTokens:
    """Tokens that a step draws of constrained requests, and when a GPU's have come."""

    step: _Step
    tokens: Tensor  # [R] int64, on the host
    has_come: Event | None

    def asked(self) -> list[tuple[Constraint, Sequence[int]]]:
        """Return what a MaskThread is asked for, once they have come."""
        step, drawn = self.step, self.tokens.tolist()
        return [
            (constraint, _kept(drawn, i, step.drafts[i]) if i in step.drafts else (drawn[i],))
            for i, constraint in step.constrained.items()
            if drawn[i] != NO_TOKEN
        ]


@runtime_checkable
class MaskLanes(Protocol):
    """A backend whose threads advance matchers while they wait for the next step."""

    def mask_lane(self, calls: MatcherCalls) -> MaskLane: ...


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
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)  # by row
        if stream is None and self._device.type != "cpu":
            stream = CudaStream()
        self._stream = stream
        limits = (max_num_seqs, max_num_batched_tokens, max_blocks)
        self._host_steps = [HostStep(*limits, stream) for _ in range(2)]
        self._device_step = None if stream is None else DeviceStep(*limits, self._device)
        drawer = model.backend if isinstance(model.backend, TokenDrawer) else None
        self._sampler = Sampler(max_num_seqs, self.vocab_size, self._device, drawer)
        self._last_tokens = (
            torch.zeros(max_num_seqs, dtype=torch.int64)
            if self._device_step is None
            else self._device_step.last_tokens
        )
        backend = model.backend
        self._masks = MaskThread(backend.mask_lane if isinstance(backend, MaskLanes) else None)
        self._mask_bits = torch.empty(0, 0, dtype=torch.int32)  # a CPU's, and the same as bytes
        self._mask_bytes = memoryview(b"")
        self._constraints: dict[int, tuple[Request, Constraint]] = {}  # by row
        self._drawn: _DrawnTokens | None = None  # by the step before
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
        step = self._stage(plan)
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
                num_seqs, self._tables.shape[1], dtype=torch.int32, device=self._device
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

    def _stage(self, plan: Plan) -> _Step:
        self._host_steps.reverse()
        host = self._host_steps[0]
        host.wait_until_copied()
        staging = host.fields
        token_ids, positions = staging.token_ids.numpy(), staging.positions.numpy()
        slots, context_lens = staging.slots.numpy(), staging.context_lens.numpy()
        query_starts = staging.query_starts.numpy()
        query_starts[0] = 0
        chunks = plan.chunks
        sampling_rows: list[SamplingRow] = []
        constrained: dict[int, Constraint] = {}
        drafts: dict[int, Sequence[int]] = {}
        logit_tokens: list[int] = []
        pending_tokens: list[int] = []
        pending_rows: list[int] = []
        t = 0
        for i, chunk in enumerate(chunks):
            request, row, start, n = chunk.request, chunk.row, chunk.start, chunk.num_tokens
            table = self._tables[row]
            if chunk.new_blocks:
                first = chunk.first_new_block
                table[first : first + len(chunk.new_blocks)] = chunk.new_blocks
            num_known = n - chunk.is_pending - len(chunk.drafts)
            if n == 1:
                positions[t] = start
                slots[t] = table[start // BLOCK_SIZE] * BLOCK_SIZE + start % BLOCK_SIZE
                if num_known:
                    token_ids[t] = request.tokens[start]
            else:
                where = np.arange(start, start + n)
                positions[t : t + n] = where
                slots[t : t + n] = table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
                token_ids[t : t + num_known] = request.tokens[start : start + num_known]
                if chunk.drafts:
                    token_ids[t + num_known : t + n] = chunk.drafts
            t += n
            context_lens[i] = start + n
            query_starts[i + 1] = t
            if chunk.is_pending:
                pending_tokens.append(t - 1)
                pending_rows.append(row)
            if request.grammar is not None:
                if chunk.is_admission:
                    self._constrain(request, row)
                if chunk.samples:
                    constrained[len(sampling_rows)] = self._constraints[row][1]
            if chunk.samples:
                if chunk.drafts:
                    drafts[len(sampling_rows)] = chunk.drafts
                sampling, position = request.sampling, chunk.position
                num_drawn = position - len(request.prompt_token_ids)
                logit_tokens.append(t - 1 - len(chunk.drafts))
                sampling_rows.append(SamplingRow(row, position, num_drawn, sampling))
                for j in range(1, 1 + len(chunk.drafts)):
                    logit_tokens.append(logit_tokens[-1] + 1)
                    sampling_rows.append(
                        SamplingRow(row, position + j, num_drawn + j, sampling, chunk.drafts[:j])
                    )
        masked = [*constrained]
        for i in constrained:
            if i in drafts:
                masked += range(i + 1, i + 1 + len(drafts[i]))
        num_seqs = len(chunks)
        max_context_len = int(context_lens[:num_seqs].max())
        max_blocks = -(-max_context_len // BLOCK_SIZE)
        rows = [chunk.row for chunk in chunks]
        tables = staging.tables.numpy()[: num_seqs * max_blocks].reshape(num_seqs, max_blocks)
        tables[:] = self._tables[rows, :max_blocks]
        for field, values in (
            (staging.logit_tokens, logit_tokens),
            (staging.sampling_rows, [row.row for row in sampling_rows]),
            (staging.pending_tokens, pending_tokens),
            (staging.pending_rows, pending_rows),
        ):
            field.numpy()[: len(values)] = values
        drawing_settings(sampling_rows, masked, staging.draws)
        is_decode = t == num_seqs == len(sampling_rows) and not plan.scored and not plan.embedded
        has_prompt_graph = False
        if self._graphs is not None and is_decode:
            self._graphs.pad(staging, num_seqs, len(pending_tokens))
        elif self._prompt_graphs is not None:
            has_prompt_graph = self._prompt_graphs.pad(staging, t, num_seqs)
        return _Step(
            host,
            t,
            num_seqs,
            len(pending_tokens),
            max_blocks,
            max(chunk.num_tokens for chunk in chunks),
            max_context_len,
            is_decode,
            has_prompt_graph,
            sampling_rows,
            constrained,
            drafts,
            masked,
            [
                _Penalized.of(chunk)
                for chunk in chunks
                if chunk.is_admission and chunk.request.sampling.has_penalties
            ],
            self._stage_scores(plan) if plan.scored else (),
            self._stage_embedded(plan) if plan.embedded else (),
        )

    def _constrain(self, request: Request, row: int) -> None:
        """Begin, or begin again, the grammar of a request that gets the row."""
        assert request.grammar is not None
        ended = [i for i, (r, _) in self._constraints.items() if r.finish_reason is not None]
        for i in ended:
            del self._constraints[i]
        sampling = request.sampling
        constraint = Constraint(
            request.grammar, sampling.stop_token_ids, min_tokens=sampling.min_tokens
        )
        self._constraints[row] = (request, constraint)
        self._masks.ask([(constraint, request.tokens[len(request.prompt_token_ids) :])])

    def _stage_scores(self, plan: Plan) -> list[ScoredRows]:
        starts = self._host_steps[0].fields.query_starts.tolist()
        first_rows = dict(zip(plan.chunks, starts, strict=False))
        return [
            ScoredRows(
                first_rows[span.chunk] + span.start - span.chunk.start, span.targets, span.num_top
            )
            for span in plan.scored
        ]

    def _stage_embedded(self, plan: Plan) -> list[int]:
        starts = self._host_steps[0].fields.query_starts.tolist()
        ends = dict(zip(plan.chunks, starts[1:], strict=False))
        return [ends[chunk] - 1 for chunk in plan.embedded]

    def _run(self, step: _Step, deliver: Callable[[], None]) -> StepResult:
        """Run a CPU's step; beside its layers, deliver the one before and have its masks made."""

        def before_layers() -> None:
            self._take_what_came()
            deliver()

        return self._execute(step, before_layers)()

    @torch.inference_mode()
    def _execute(
        self, step: _Step, before_layers: Callable[[], None] | None = None
    ) -> Callable[[], StepResult]:
        """Queue the step on the device; the returned call makes the result of what has come."""
        fields = self._fields_of(step)
        t, num_seqs = step.num_tokens, step.num_seqs
        num_drawn = len(step.sampling_rows)
        layout = StepLayout(
            positions=fields.positions[:t],
            slots=fields.slots[:t],
            query_starts=fields.query_starts[: num_seqs + 1],
            context_lens=fields.context_lens[:num_seqs],
            block_tables=fields.tables[: num_seqs * step.num_blocks].view(num_seqs, -1),
            max_query_len=step.max_query_len,
            max_context_len=step.max_context_len,
        )
        for begin in step.penalized:
            self._sampler.begin(begin.row, begin.prompt, begin.outputs)
        trials = self._try_drafts(step)
        logit_tokens = fields.logit_tokens[:num_drawn]
        scores: list[Scores] = []
        embedded: Tensor | None = None
        drawn: Tensor | None = None
        if self._graphs is not None and step.is_decode:
            logits, drawn = self._graphs.forward(num_seqs, layout.block_tables)
        else:
            h = self._hidden_states(step, fields, layout, before_layers)
            logits = self._model.logits(h, logit_tokens)
            if step.scored:
                scores = score(self._model, h, step.scored)
            if step.embedded:
                embedded = self._fetch(embed(self._model, h, step.embedded))
        scores = [self._fetch_scores(some) for some in scores]
        if not num_drawn:
            return lambda: _with_what_was_read(StepResult([], []), scores, embedded)
        masks = self._masks_of(step, trials) if step.constrained else None
        settings = fields.draws[:num_drawn]
        sampled = self._sampler.sample(logits, step.sampling_rows, masks, settings, drawn)
        # A step planned before this one's end feeds even a token that wasn't drawn: as a 0, to a
        # request that has ended by then. Of a request with drafts it feeds none.
        if sampled.tokens is not drawn:
            self._last_tokens[fields.sampling_rows[:num_drawn]] = sampled.tokens.clamp(min=0)
        sampled = self._fetch_sampled(sampled)
        if step.constrained:
            has_come = None if self._stream is None else self._stream.record()
            drawn_tokens = _DrawnTokens(step, sampled.tokens, has_come)
            if has_come is not None or not self._start_masks(drawn_tokens):
                self._drawn = drawn_tokens
        return lambda: _with_what_was_read(_collect(sampled, step.sampling_rows), scores, embedded)

    def _hidden_states(
        self,
        step: _Step,
        fields: StepFields,
        layout: StepLayout,
        before_layers: Callable[[], None] | None,
    ) -> Tensor:
        if step.num_pending:
            feed(fields, step.num_pending, self._last_tokens)
        if self._prompt_graphs is not None and step.has_prompt_graph:
            return self._prompt_graphs.hidden_states(step.num_tokens, layout.block_tables)
        return self._model.hidden_states(
            fields.token_ids[: step.num_tokens],
            layout,
            self._kv_cache,
            before_layers=before_layers,
        )

    def _fields_of(self, step: _Step) -> StepFields:
        """Return the step's numbers where the device reads them."""
        if self._stream is None or self._device_step is None:
            return step.host.fields
        self._device_step.take(step.host, step.num_seqs * step.num_blocks, self._stream)
        return self._device_step.fields

    def _fetch(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the host, to be read when the step is done."""
        if self._stream is None:
            return tensor
        host = self._stream.pinned(tensor.shape, tensor.dtype)
        self._stream.copy(host, tensor)
        return host

    def _fetch_sampled(self, sampled: Sampled) -> Sampled:
        batch = sampled.logprobs
        if batch is not None:
            batch = LogprobsBatch(
                self._fetch(batch.sampled),
                self._fetch(batch.top_values),
                self._fetch(batch.top_tokens),
            )
        return replace(sampled, tokens=self._fetch(sampled.tokens), logprobs=batch)

    def _fetch_scores(self, scores: Scores) -> Scores:
        return replace(
            scores,
            values=self._fetch(scores.values),
            ranks=self._fetch(scores.ranks),
            top_values=self._fetch(scores.top_values),
            top_token_ids=self._fetch(scores.top_token_ids),
        )

    def _try_drafts(self, step: _Step) -> dict[int, Trial]:
        """Have the masks behind the drafts of constrained requests computed while the layers run.

        Drafts are known, and so is what came before them: nothing here is worth a GPU's wait.
        """
        trials: dict[int, Trial] = {}
        for i in step.constrained:
            if i not in step.drafts:
                continue
            if not trials:
                self._take_what_came()
                self._masks.settle()
            trials[i] = step.constrained[i].trial()
        for i, trial in trials.items():
            self._masks.ask([(trial, [draft]) for draft in step.drafts[i]])
        return trials

    def _masks_of(self, step: _Step, trials: dict[int, Trial]) -> TokenMasks:
        """Return the masks, once the thread has them: they were asked for before the layers ran.

        On a GPU they are of tokens that the step before draws: this step's layers are queued
        behind it, and run while the tokens come and their masks are computed.
        """
        self._take_what_came()
        self._masks.settle()
        masks = [constraint.mask for constraint in step.constrained.values()]
        failures = {
            i: constraint.failure
            for i, constraint in step.constrained.items()
            if constraint.failure is not None
        }
        for i, trial in trials.items():
            for j in range(len(step.drafts[i])):
                if j < len(trial.masks):
                    masks.append(trial.masks[j])
                else:  # a draft before it is not allowed, or nothing is behind it
                    masks.append(trial.grammar.no_tokens)
                    failures[i + 1 + j] = trial.failure or ""
        return TokenMasks(step.masked, self._bits_of(masks), failures)

    def _bits_of(self, masks: Sequence[bytes | bytearray]) -> Tensor:
        """Return the masks where the device reads them, [len(masks), words] int32."""
        joined = b"".join(masks)
        if self._stream is not None:
            words = torch.frombuffer(bytearray(joined), dtype=torch.int32)
            return upload(words.view(len(masks), -1), torch.int32, self._device)
        # The step before, which read what was here, is done; new tensors would take 20 µs.
        if len(self._mask_bytes) < len(joined):
            self._mask_bits = torch.empty(len(masks), len(masks[0]) // 4, dtype=torch.int32)
            self._mask_bytes = self._mask_bits.numpy().data.cast("B")
        self._mask_bytes[: len(joined)] = joined
        return self._mask_bits[: len(masks)]

    def _take_what_came(self) -> None:
        """Have the masks computed that follow the tokens of the step before.

        On a CPU when the layers begin, where that isn't begun yet: until then a thread of Python's
        would take turns with the step's for the GIL.
        """
        came, self._drawn = self._drawn, None
        if came is None:
            return
        if came.has_come is not None:
            came.has_come.synchronize()
            if self._start_masks(came):
                return
        self._masks.ask(came.asked())

    def _start_masks(self, drawn: _DrawnTokens) -> bool:
        """Have the masks that follow these tokens computed natively; return whether they are."""
        step = drawn.step
        return step.drafts.keys().isdisjoint(step.constrained) and self._masks.start(
            step.constrained, drawn.tokens
        )


def _kept(drawn: Sequence[int], first: int, drafts: Sequence[int]) -> list[int]:
    """Return the tokens drawn up to the first that is not the draft, or that couldn't be drawn.

    drawn  from first on behind the token before the drafts, and behind each draft
    """
    kept = [drawn[first]]
    for draft, token in zip(drafts, drawn[first + 1 : first + 1 + len(drafts)], strict=True):
        if kept[-1] != draft or token == NO_TOKEN:
            break
        kept.append(token)
    return kept


def warm_up_sizes(max_num_batched_tokens: int) -> list[int]:
    """Return numbers of a step's tokens for which one at least meets every compiled variant.

    Which tile a kernel has, and whether its sum is split, changes with the number of tokens.
    """
    sizes = [1, 2, 9, 17, 33, 65, 129, 257, 385, 513, 769, 1025, 1537, 2049, 4097, 8193]
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]


def _with_what_was_read(
    result: StepResult, scores: Sequence[Scores], embedded: Tensor | None
) -> StepResult:
    """Return the result with what the step read of prompts."""
    if not scores and embedded is None:
        return result
    return replace(
        result,
        prompt_logprobs=[span for some in scores for span in some.collect()],
        embeddings=[] if embedded is None else packed_embeddings(embedded),
    )


def _collect(sampled: Sampled, rows: Sequence[SamplingRow]) -> StepResult:
    tokens: list[int | None] = sampled.tokens.tolist()
    failures: dict[int, str] = {}
    for i, token in enumerate(tokens):
        if token == NO_TOKEN:
            tokens[i] = None
            failures[i] = sampled.failures.get(i, _NOT_FINITE)
    batch = sampled.logprobs
    if batch is None:
        return StepResult(tokens, [None] * len(tokens), failures)
    chosen = batch.sampled.tolist()
    values, ids = batch.top_values.tolist(), batch.top_tokens.tolist()
    logprobs: list[TokenLogprobsRow | None] = []
    for i, row in enumerate(rows):
        k = row.sampling.logprobs
        if k is None:
            logprobs.append(None)
        else:
            top = list(zip(ids[i][:k], values[i][:k], strict=True))
            logprobs.append((chosen[i], top))
    return StepResult(tokens, logprobs, failures)
