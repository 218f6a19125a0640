"""Reads models from disk: one file a format, one line here."""

from pathlib import Path

import torch
from bitwatt_kernels.backend import Backend

from bitwatt.checkpoints.checkpoint import Checkpoint, Format
from bitwatt.checkpoints.gguf import GgufCheckpoint
from bitwatt.checkpoints.huggingface import HuggingFaceCheckpoint
from bitwatt.checkpoints.quantized import QuantizedCheckpoint
from bitwatt.errors import CheckpointError
from bitwatt.model.build import build_transformer
from bitwatt.model.config import HeadBits, Weights
from bitwatt.model.folder import why_no_folder, why_no_model
from bitwatt.model.transformer import Transformer

__all__ = ["load_model", "open_checkpoint"]


_FORMATS: dict[str, type[Format]] = {
    "a Hugging Face folder with config.json and safetensors files": HuggingFaceCheckpoint,
    "a GGUF file": GgufCheckpoint,
}


def open_checkpoint(path: Path, *, quantize: bool = False) -> Checkpoint:
    """Return what is at path, its configuration and headers read.

    quantize  ternarizes linears that are dense; see QuantizedCheckpoint
    Raises    CheckpointError, naming the file or field and the reason
    """
    reason = why_no_folder(path)
    for checkpoint_type in _FORMATS.values():
        if reason is None and checkpoint_type.recognizes(path):
            checkpoint = checkpoint_type(path)
            return QuantizedCheckpoint(checkpoint, path) if quantize else checkpoint
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
    quantize: bool = False,
) -> Transformer:
    """Return the model at path, ready on the backend's device.

    weights        "ternary" keeps linears packed; "dense" makes them matrices of dtype
    max_model_len  lowers the model's own context
    head_bits      8 rounds the head, and with it a tied embedding, to int8: logits move a little
    quantize       ternarizes linears that are dense; "dense" then has what that leaves of them
    Raises         CheckpointError, naming the file or field and the reason
    """
    checkpoint = open_checkpoint(path, quantize=quantize)
    if weights == "ternary" and checkpoint.why_dense is not None:
        raise CheckpointError(
            f"{checkpoint.why_dense}; --quantize ternarizes them, at a loss of quality"
        )
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
