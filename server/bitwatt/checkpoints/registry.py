"""Reads models from disk: one file a format, one line here."""

from pathlib import Path
from typing import Protocol

import torch
from bitwatt_kernels.backend import Backend

from bitwatt.checkpoints.gguf import GgufCheckpoint
from bitwatt.checkpoints.huggingface import HuggingFaceCheckpoint
from bitwatt.errors import CheckpointError
from bitwatt.model.build import build_transformer
from bitwatt.model.config import HeadBits, Weights
from bitwatt.model.folder import why_no_folder, why_no_model
from bitwatt.model.tensor_source import TensorSource
from bitwatt.model.transformer import Transformer

__all__ = ["Checkpoint", "load_model", "open_checkpoint"]


class Checkpoint(TensorSource, Protocol):
    """A model on disk. Its tensors may be views of mapped files, to be copied by the reader.

    stored_as  how the linears are stored, and what a ternary one's scale means
    why_dense  what refuses ternary weights of linears that are dense; None where they're ternary
    """

    stored_as: str
    why_dense: str | None

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Return whether the path looks like this format."""
        ...

    def __init__(self, path: Path) -> None: ...

    def check_all_read(self) -> None:
        """Raise CheckpointError if it holds a tensor that no one asked for."""
        ...


_FORMATS: dict[str, type[Checkpoint]] = {
    "a Hugging Face folder with config.json and safetensors files": HuggingFaceCheckpoint,
    "a GGUF file": GgufCheckpoint,
}


def open_checkpoint(path: Path) -> Checkpoint:
    """Return what is at path, its configuration and headers read.

    Raises  CheckpointError, naming the file or field and the reason
    """
    reason = why_no_folder(path)
    for checkpoint_type in _FORMATS.values():
        if reason is None and checkpoint_type.recognizes(path):
            return checkpoint_type(path)
    raise CheckpointError(
        f"{path} is none of: {'; '.join(_FORMATS)}. It {reason or why_no_model(path)}"
    )


def load_model(
    path: Path,
    *,
    weights: Weights,
    backend: Backend,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    head_bits: HeadBits = 16,
) -> Transformer:
    """Return the model at path, ready on the backend's device.

    weights        "ternary" keeps linears packed; "dense" makes them matrices of dtype
    max_model_len  lowers the model's own context
    head_bits      8 rounds the head, and with it a tied embedding, to int8: logits move a little
    Raises         CheckpointError, naming the file or field and the reason
    """
    checkpoint = open_checkpoint(path)
    if weights == "ternary" and checkpoint.why_dense is not None:
        raise CheckpointError(checkpoint.why_dense)
    model = build_transformer(
        checkpoint,
        weights=weights,
        backend=backend,
        dtype=dtype,
        max_model_len=max_model_len,
        head_bits=head_bits,
    )
    checkpoint.check_all_read()
    return model
