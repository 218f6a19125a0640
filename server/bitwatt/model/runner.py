"""Turns a plan into a forward pass: stages its tokens, runs the model, draws the next tokens.

launch() returns before the device is done, so that the host can plan the next step meanwhile;
steps run in the order they were launched. A pending token, sampled by a step the host has not
seen the end of, is fed from the device's own copy.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from torch import Tensor

from bitwatt.constraints.masks import Constraint, MaskThread
from bitwatt.model.graphs import DecodeGraphs
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_scoring import ScoredRows, Scores, score
from bitwatt.model.runner_protocol import StepResult, StepResultHandle, TokenLogprobsRow
from bitwatt.model.sampler import Sampled, Sampler, SamplingRow, TokenMasks
from bitwatt.model.step_thread import StepThread
from bitwatt.model.transformer import Transformer
from bitwatt.model.truncation_sampling import NO_TOKEN
from bitwatt.scheduling.request import Request
from bitwatt.scheduling.scheduler import Chunk, Plan

__all__ = ["ModelRunner"]

_NOT_FINITE = "the logits of its next token are not finite, so none can be drawn"


class _Staging:
    """Host buffers of one step, reused every other step: the device may still read the last."""

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks: int, *, is_pinned: bool
    ) -> None:
        def integers(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=is_pinned)

        self.token_ids = integers(max_num_tokens, dtype=torch.int64)
        self.positions = integers(max_num_tokens, dtype=torch.int64)
        self.slots = integers(max_num_tokens, dtype=torch.int64)
        self.query_starts = integers(max_num_seqs + 1, dtype=torch.int32)
        self.context_lens = integers(max_num_seqs, dtype=torch.int32)
        self.block_tables = integers(max_num_seqs, max_blocks, dtype=torch.int32)


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
    """One staged step, host tensors until the device takes them."""

    token_ids: Tensor
    layout: StepLayout
    logit_tokens: Tensor  # [R] int64, index of each sampling chunk's last token
    pending_tokens: Tensor  # [P] int64, index of each token the device must fill in
    pending_rows: Tensor  # [P] int64
    sampling_rows: list[SamplingRow]
    constrained: dict[int, Constraint]  # by index among sampling_rows
    penalized: list[_Penalized]
    scored: Sequence[ScoredRows]


@dataclass(frozen=True, slots=True)
class _DrawnTokens:
    """Tokens that a GPU's step draws of constrained requests, and when they have come."""

    constraints: list[Constraint]
    token_ids: Tensor  # [M] int64, pinned
    has_come: torch.cuda.Event


class _Handle:
    def __init__(self, future: Future[StepResult]) -> None:
        self._future = future

    def wait(self) -> StepResult:
        return self._future.result()


class _DeviceHandle:
    def __init__(self, collect: Callable[[], StepResult]) -> None:
        self._collect = collect

    def wait(self) -> StepResult:
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
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = model.backend.device
        self.vocab_size = model.config.vocab_size
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)  # by row
        is_cuda = self._device.type == "cuda"
        self._staging = [
            _Staging(max_num_seqs, max_num_batched_tokens, max_blocks, is_pinned=is_cuda)
            for _ in range(2)
        ]
        self._sampler = Sampler(max_num_seqs, self.vocab_size, self._device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)
        self._masks = MaskThread()
        self._constraints: dict[int, tuple[Request, Constraint]] = {}  # by row
        self._drawn: _DrawnTokens | None = None  # by the step before, on a GPU
        self._graphs: DecodeGraphs | None = None
        self._thread: StepThread | None = None
        if is_cuda:
            self._graphs = DecodeGraphs(
                model, kv_cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
        else:
            self._thread = StepThread()

    def launch(self, plan: Plan) -> StepResultHandle:
        step = self._stage(plan)
        if self._thread is not None:
            return _Handle(self._thread.submit(lambda then: self._execute(step, then)()))
        return _DeviceHandle(self._execute(step))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
        self._masks.close()

    def _stage(self, plan: Plan) -> _Step:
        self._staging.reverse()
        staging = self._staging[0]
        token_ids, positions = staging.token_ids.numpy(), staging.positions.numpy()
        slots, context_lens = staging.slots.numpy(), staging.context_lens.numpy()
        query_starts = staging.query_starts.numpy()
        chunks = plan.chunks
        sampling_rows: list[SamplingRow] = []
        constrained: dict[int, Constraint] = {}
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
            num_known = n - chunk.is_pending
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
                logit_tokens.append(t - 1)
                num_drawn = chunk.position - len(request.prompt_token_ids)
                sampling_rows.append(SamplingRow(row, chunk.position, num_drawn, request.sampling))
        num_seqs = len(chunks)
        max_context_len = int(context_lens[:num_seqs].max())
        max_blocks = -(-max_context_len // BLOCK_SIZE)
        rows = [chunk.row for chunk in chunks]
        staging.block_tables.numpy()[:num_seqs, :max_blocks] = self._tables[rows, :max_blocks]
        layout = StepLayout(
            positions=staging.positions[:t],
            slots=staging.slots[:t],
            query_starts=staging.query_starts[: num_seqs + 1],
            context_lens=staging.context_lens[:num_seqs],
            block_tables=staging.block_tables[:num_seqs, :max_blocks].contiguous(),
            max_query_len=max(chunk.num_tokens for chunk in chunks),
            max_context_len=max_context_len,
        )
        return _Step(
            staging.token_ids[:t],
            layout,
            torch.tensor(logit_tokens, dtype=torch.int64),
            torch.tensor(pending_tokens, dtype=torch.int64),
            torch.tensor(pending_rows, dtype=torch.int64),
            sampling_rows,
            constrained,
            [
                _Penalized.of(chunk)
                for chunk in chunks
                if chunk.is_admission and chunk.request.sampling.has_penalties
            ],
            self._stage_scores(plan) if plan.scored else (),
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
        starts = self._staging[0].query_starts.tolist()
        first_rows = dict(zip(plan.chunks, starts, strict=False))
        return [
            ScoredRows(
                first_rows[span.chunk] + span.start - span.chunk.start, span.targets, span.num_top
            )
            for span in plan.scored
        ]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _execute(
        self, step: _Step, before_layers: Callable[[], None] | None = None
    ) -> Callable[[], StepResult]:
        """Queue the step on the device; the returned call waits for it and fetches the result."""
        layout = step.layout
        num_seqs = len(layout.context_lens)
        layout = replace(
            layout,
            positions=self._to_device(layout.positions),
            slots=self._to_device(layout.slots),
            query_starts=self._to_device(layout.query_starts),
            context_lens=self._to_device(layout.context_lens),
            block_tables=self._to_device(layout.block_tables),
        )
        token_ids = self._to_device(step.token_ids)
        if len(step.pending_rows):
            rows = self._to_device(step.pending_rows)
            token_ids[self._to_device(step.pending_tokens)] = self._last_tokens[rows]
        for begin in step.penalized:
            self._sampler.begin(begin.row, begin.prompt, begin.outputs)
        logit_tokens = self._to_device(step.logit_tokens)
        scores: list[Scores] = []
        if step.scored:
            h = self._model.hidden_states(
                token_ids, layout, self._kv_cache, before_layers=before_layers
            )
            logits = self._model.logits(h, logit_tokens)
            scores = score(self._model, h, step.scored)
        elif self._graphs is not None and len(logit_tokens) == len(token_ids) == num_seqs:
            logits = self._graphs.forward(token_ids, layout)
        else:
            logits = self._model.forward(
                token_ids, layout, self._kv_cache, logit_tokens, before_layers=before_layers
            )
        rows_drawn = [row.row for row in step.sampling_rows]
        if not rows_drawn:
            return lambda: _with_scores(StepResult([], []), scores)
        masks = self._masks_of(step.constrained) if step.constrained else None
        sampled = self._sampler.sample(logits, step.sampling_rows, masks)
        # A step planned before this one's end feeds even a token that wasn't drawn: as a 0, to a
        # request that has ended by then.
        indices = torch.tensor(rows_drawn, device=self._device)
        self._last_tokens[indices] = sampled.tokens.clamp(min=0)
        if step.constrained:
            self._take_drawn(step.constrained, sampled.tokens)
        return lambda: _with_scores(_collect(sampled, step.sampling_rows), scores)

    def _masks_of(self, constrained: dict[int, Constraint]) -> TokenMasks:
        """Return the masks, once the thread has them: they were asked for before the layers ran.

        On a GPU they are of tokens that the step before draws: this step's layers are queued
        behind it, and run while the tokens come and their masks are computed.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            drawn.has_come.synchronize()
            self._advance(drawn.constraints, drawn.token_ids.tolist())
        self._masks.settle()
        packed = b"".join([constraint.mask for constraint in constrained.values()])
        bits = torch.frombuffer(bytearray(packed), dtype=torch.int32).view(len(constrained), -1)
        failures = {i: c.failure for i, c in constrained.items() if c.failure is not None}
        if self._device.type == "cuda":
            bits = self._to_device(bits.pin_memory())
        return TokenMasks(list(constrained), bits, failures)

    def _take_drawn(self, constrained: dict[int, Constraint], tokens: Tensor) -> None:
        """Have the next masks computed, now or, where the tokens are on their way, later."""
        constraints = list(constrained.values())
        if self._device.type == "cpu":
            drawn = tokens.tolist()
            self._advance(constraints, [drawn[i] for i in constrained])
            return
        indices = torch.tensor(list(constrained), device=self._device)
        token_ids = torch.empty(len(constrained), dtype=torch.int64, pin_memory=True)
        token_ids.copy_(tokens[indices], non_blocking=True)
        has_come = torch.cuda.Event()  # type: ignore[no-untyped-call]
        has_come.record()
        self._drawn = _DrawnTokens(constraints, token_ids, has_come)

    def _advance(self, constraints: list[Constraint], drawn: list[int]) -> None:
        pairs = zip(constraints, drawn, strict=True)
        self._masks.ask([(constraint, [token]) for constraint, token in pairs if token >= 0])


def _with_scores(result: StepResult, scores: Sequence[Scores]) -> StepResult:
    if not scores:
        return result
    return replace(result, prompt_logprobs=[span for some in scores for span in some.collect()])


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
