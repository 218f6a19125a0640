"""A device that lags behind the host: what is copied to or from it moves when somebody waits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["LaggingStream"]


class _Event:
    def __init__(self, stream: "LaggingStream", place: int) -> None:
        self._stream = stream
        self._place = place

    def synchronize(self) -> None:
        self._stream.run_to(self._place)


class LaggingStream:
    """A stream over CPU tensors, which no step outruns and nothing but a wait moves.

    Arithmetic happens at once, with what each copy ought to bring. Copies to the host arrive
    late, in memory full of nonsense till then; a source that changes before its copy's turn is
    counted.

    num_overwritten  copies whose source was written before the device had read it
    """

    def __init__(self) -> None:
        self.num_overwritten = 0
        self._pinned: list[Tensor] = []
        self._queue: list[Callable[[], None]] = []
        self._num_done = 0

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.full(tuple(shape), 99, dtype=dtype)
        self._pinned.append(memory)
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        meant = source.clone()
        if any(_is_within(target, memory) for memory in self._pinned):
            self._queue.append(lambda: np.copyto(target.numpy(), meant.numpy()))
            return
        assert any(_is_within(source, memory) for memory in self._pinned), "not pinned: it waits"
        target.copy_(meant)

        def check() -> None:
            self.num_overwritten += not torch.equal(source, meant)

        self._queue.append(check)

    def record(self) -> _Event:
        return _Event(self, self._num_done + len(self._queue))

    def run_to(self, place: int) -> None:
        while self._num_done < place:
            self._queue.pop(0)()
            self._num_done += 1


def _is_within(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
