"""Stages a plan: writes the numbers that one step's forward pass and draws read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout

from bitwatt.constraints.constraint import Constraint
from bitwatt.model.prompt_scoring import ScoredRows
from bitwatt.model.sampler import SamplingRow, drawing_settings
from bitwatt.model.step_buffers import HostStep, StepFields
from bitwatt.model.step_masks import MaskedDraws, StepMasks
from bitwatt.model.streams import Stream
from bitwatt.scheduling.plan import Chunk, Plan

__all__ = ["Penalized", "StagedStep", "Staging"]


@dataclass(frozen=True, slots=True)
class Penalized:
    """A request that begins, or resumes, to run and whose token counts matter."""

    row: int
    prompt: list[int]
    outputs: list[int]

    @classmethod
    def of(cls, chunk: Chunk) -> "Penalized":
        """Return the chunk's request, with the tokens it has so far."""
        prompt = chunk.request.prompt_token_ids
        return cls(chunk.row, prompt, chunk.request.tokens[len(prompt) :])


@dataclass(frozen=True, slots=True)
class StagedStep:
    """One staged step: its numbers, and how many there are of each.

    num_blocks     of a row of the block tables
    is_decode      every sequence brings one token, and one is drawn behind each
    sampling_rows  a draw each
    embedded       rows of the step's hidden states
    """

    host: HostStep
    num_tokens: int
    num_seqs: int
    num_pending: int
    num_blocks: int
    max_query_len: int
    max_context_len: int
    is_decode: bool
    sampling_rows: list[SamplingRow]
    masked: MaskedDraws
    penalized: list[Penalized]
    scored: Sequence[ScoredRows]
    embedded: Sequence[int]

    def layout(self, fields: StepFields) -> StepLayout:
        """Return the step's layout in these fields: the host's own, or the device's copy."""
        t, num_seqs = self.num_tokens, self.num_seqs
        return StepLayout(
            positions=fields.positions[:t],
            slots=fields.slots[:t],
            query_starts=fields.query_starts[: num_seqs + 1],
            context_lens=fields.context_lens[:num_seqs],
            block_tables=fields.tables[: num_seqs * self.num_blocks].view(num_seqs, -1),
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
        )


class Staging:
    """Writes steps into two host blocks in turns: a step may still be copied as the next comes."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        stream: Stream | None,
        masks: StepMasks,
    ) -> None:
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)  # by row
        self._host_steps = [
            HostStep(max_num_seqs, max_num_tokens, max_blocks, stream) for _ in range(2)
        ]
        self._masks = masks

    def stage(self, plan: Plan) -> StagedStep:
        """Return the plan's step; its numbers hold until the step after the next is staged."""
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
        constraints: dict[int, Constraint] = {}
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
                    self._masks.begin(request, row)
                if chunk.samples:
                    constraints[len(sampling_rows)] = self._masks.constraint_of(row)
                    if chunk.drafts:
                        drafts[len(sampling_rows)] = chunk.drafts
            if chunk.samples:
                sampling, position = request.sampling, chunk.position
                num_drawn = position - len(request.prompt_token_ids)
                logit_tokens.append(t - 1 - len(chunk.drafts))
                sampling_rows.append(SamplingRow(row, position, num_drawn, sampling))
                for j in range(1, 1 + len(chunk.drafts)):
                    logit_tokens.append(logit_tokens[-1] + 1)
                    sampling_rows.append(
                        SamplingRow(row, position + j, num_drawn + j, sampling, chunk.drafts[:j])
                    )
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
        masked = MaskedDraws.of(constraints, drafts)
        drawing_settings(sampling_rows, masked.indices, staging.draws)
        return StagedStep(
            host=host,
            num_tokens=t,
            num_seqs=num_seqs,
            num_pending=len(pending_tokens),
            num_blocks=max_blocks,
            max_query_len=max(chunk.num_tokens for chunk in chunks),
            max_context_len=max_context_len,
            is_decode=t == num_seqs == len(sampling_rows) and not plan.scored and not plan.embedded,
            sampling_rows=sampling_rows,
            masked=masked,
            penalized=[
                Penalized.of(chunk)
                for chunk in chunks
                if chunk.is_admission and chunk.request.sampling.has_penalties
            ],
            scored=_scored_rows(plan, staging) if plan.scored else (),
            embedded=_embedded_rows(plan, staging) if plan.embedded else (),
        )


def _scored_rows(plan: Plan, fields: StepFields) -> list[ScoredRows]:
    first_rows = dict(zip(plan.chunks, fields.query_starts.tolist(), strict=False))
    return [
        ScoredRows(
            first_rows[span.chunk] + span.start - span.chunk.start, span.targets, span.num_top
        )
        for span in plan.scored
    ]


def _embedded_rows(plan: Plan, fields: StepFields) -> list[int]:
    ends = dict(zip(plan.chunks, fields.query_starts.tolist()[1:], strict=False))
    return [ends[chunk] - 1 for chunk in plan.embedded]
