"""What a step asks of a device that runs behind the host: copies that nobody waits for, and events.

torch waits for the device in many an innocent call: `torch.tensor(..., device=)`, `.tolist()`,
`.to()` from memory that isn't pinned. A step that is launched must make none of them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaStream", "Event", "Stream", "upload"]


class Event(Protocol):
    """A point in the device's queue."""

    def synchronize(self) -> None:
        """Return once the device has come by."""
        ...


class Stream(Protocol):
    """The queue of one device."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return host memory, of no particular content, that the device can copy by itself."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; the host's side of it is pinned, and in use until an event behind it."""
        ...

    def record(self) -> Event:
        """Return an event behind everything queued so far."""
        ...


class CudaStream:
    """The current stream of the current CUDA device."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[attr-defined]
        return event


def upload(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers on the device, without waiting for it.

    torch keeps the pinned memory until the device has copied it.
    """
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return host.to(dtype)
    return host.to(dtype).pin_memory().to(device, non_blocking=True)
