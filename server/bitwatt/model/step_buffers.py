"""The numbers of one step in one block of memory, which reaches the device in a single copy."""

import math
from dataclasses import dataclass

import torch
from bitwatt_kernels.backend import DRAW_SETTINGS
from torch import Tensor

from bitwatt.model.streams import Event, Stream
from bitwatt.scheduling.plan import max_draws

__all__ = ["DeviceStep", "HostStep", "StepFields"]

_ALIGNMENT = 64  # bytes; Triton compiles a kernel of its own for pointers of less than 16


@dataclass(frozen=True, slots=True)
class StepFields:
    """Views into a block, each as long as any step needs; tables come last, rows side by side.

    token_ids       [max_num_tokens + 1] int64; the last is no token's: padding's are fed there
    positions, slots  [max_num_tokens] int64
    logit_tokens    [max_draws] int64, index of each token behind which one is drawn
    sampling_rows   [max_draws] int64, the request's row of per-request state
    pending_tokens  [max_num_seqs] int64, index of each token that the device must fill in
    pending_rows    [max_num_seqs] int64, the request's row
    draws           [max_draws, 6] float64, as sampler.drawing_settings writes them
    query_starts    [max_num_seqs + 1] int32
    context_lens    [max_num_seqs] int32
    tables          [max_num_seqs * max_blocks] int32
    """

    block: Tensor  # uint8
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_tokens: Tensor
    sampling_rows: Tensor
    pending_tokens: Tensor
    pending_rows: Tensor
    draws: Tensor
    query_starts: Tensor
    context_lens: Tensor
    tables: Tensor

    @staticmethod
    def _shapes(
        max_num_seqs: int, max_num_tokens: int, max_blocks: int
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        num_draws = max_draws(max_num_seqs)
        return [
            ((max_num_tokens + 1,), torch.int64),
            *[((max_num_tokens,), torch.int64)] * 2,
            *[((num_draws,), torch.int64)] * 2,
            *[((max_num_seqs,), torch.int64)] * 2,
            ((num_draws, len(DRAW_SETTINGS)), torch.float64),
            ((max_num_seqs + 1,), torch.int32),
            ((max_num_seqs,), torch.int32),
            ((max_num_seqs * max_blocks,), torch.int32),
        ]

    @classmethod
    def num_bytes(cls, max_num_seqs: int, max_num_tokens: int, max_blocks: int) -> int:
        """Return the size of a block for the limits."""
        shapes = cls._shapes(max_num_seqs, max_num_tokens, max_blocks)
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes)

    @classmethod
    def of(
        cls, block: Tensor, max_num_seqs: int, max_num_tokens: int, max_blocks: int
    ) -> "StepFields":
        """Return the views into a block of num_bytes."""
        views, start = [], 0
        for shape, dtype in cls._shapes(max_num_seqs, max_num_tokens, max_blocks):
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(block[start:stop].view(dtype).view(shape))
            start += _aligned(stop - start)
        return cls(block, *views)

    def used_bytes(self, num_table_entries: int) -> int:
        """Return the length of the part of the block that a step with such tables fills."""
        used: int = self.tables.data_ptr() - self.block.data_ptr()
        return used + num_table_entries * self.tables.itemsize


class HostStep:
    """A step's numbers on the host, written anew for every other step.

    On a CPU the step reads them where they are.
    """

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks: int, stream: Stream | None
    ) -> None:
        limits = (max_num_seqs, max_num_tokens, max_blocks)
        size = StepFields.num_bytes(*limits)
        if stream is None:
            block = torch.zeros(size, dtype=torch.uint8)
        else:
            block = stream.pinned([size], torch.uint8).zero_()
        self.fields = StepFields.of(block, *limits)
        self.in_use: Event | None = None  # behind the last copy out of the block

    def wait_until_copied(self) -> None:
        """Return once the block may be written; at once, if its last step has been waited for."""
        if self.in_use is not None:
            self.in_use.synchronize()
            self.in_use = None


class DeviceStep:
    """The device's copy of the step that runs. Graphs read it where it lies.

    last_tokens  [max_num_seqs + 1] int64, what each row has drawn last; the last is of no row
    """

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks: int, device: torch.device
    ) -> None:
        limits = (max_num_seqs, max_num_tokens, max_blocks)
        size = StepFields.num_bytes(*limits)
        self.fields = StepFields.of(torch.zeros(size, dtype=torch.uint8, device=device), *limits)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)

    def take(self, step: HostStep, num_table_entries: int, stream: Stream) -> None:
        """Queue the copy of what the host has filled."""
        used = step.fields.used_bytes(num_table_entries)
        stream.copy(self.fields.block[:used], step.fields.block[:used])
        step.in_use = stream.record()


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
