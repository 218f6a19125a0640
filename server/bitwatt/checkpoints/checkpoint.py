"""What every format of checkpoints is read as."""

from pathlib import Path
from typing import Protocol

from bitwatt.model.tensor_source import TensorSource

__all__ = ["Checkpoint", "Format"]


class Checkpoint(TensorSource, Protocol):
    """A model on disk. Its tensors may be views of mapped files, to be copied by the reader.

    stored_as  how the linears are stored, and what a ternary one's scale means
    why_dense  what refuses ternary weights of linears that are dense; None where they're ternary,
               which floats may be, too: dense() reads these as well, and is_ternary is False
    """

    stored_as: str
    why_dense: str | None

    def check_all_read(self) -> None:
        """Raise CheckpointError if it holds a tensor that no one asked for."""
        ...


class Format(Checkpoint, Protocol):
    """A checkpoint that is opened by its path."""

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Return whether the path looks like this format."""
        ...

    def __init__(self, path: Path) -> None: ...
