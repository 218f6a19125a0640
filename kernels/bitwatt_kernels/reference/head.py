"""The head's two forms: the checkpoint's own matrix, or int8 with a scale a token id."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels.reference.linear import INT8_MAX, QUANTIZATION_EPS, accumulate, quantize

__all__ = ["Int8Head", "embed", "head", "quantize_head"]


@dataclass(frozen=True, slots=True)
class Int8Head:
    """W[n, k] ≈ codes[n, k] · scales[n].

    codes   [vocab_size, hidden_size] int8
    scales  [vocab_size] float32
    dtype   of the matrix that was rounded, and of its rows as embeddings
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantize_head(weight: Tensor) -> Int8Head:
    """Return [vocab_size, hidden_size] rounded to int8, each row by its largest magnitude."""
    codes, scales = [], []
    for rows in torch.split(weight, 8192):  # float32 of a whole vocabulary would take gigabytes
        scale = rows.float().abs().amax(dim=-1).clamp(min=QUANTIZATION_EPS) / INT8_MAX
        codes.append((rows.float() / scale[:, None]).round().to(torch.int8))
        scales.append(scale)
    return Int8Head(torch.cat(codes), torch.cat(scales), weight.dtype)


def embed(token_ids: Tensor, embedding: Tensor | Int8Head) -> Tensor:
    """Return the rows of token_ids [T], [T, hidden_size]; of an int8 head as it rounds them."""
    if isinstance(embedding, Tensor):
        return F.embedding(token_ids, embedding)
    rows = embedding.codes[token_ids].float() * embedding.scales[token_ids, None]
    return rows.to(embedding.dtype)


def head(x: Tensor, weight: Tensor | Int8Head) -> Tensor:
    """Return logits [T, vocab_size] float32 of x [T, hidden_size].

    An int8 head quantizes x per token too: int32 sums, scaled in float32.
    """
    if isinstance(weight, Int8Head):
        q = quantize(x)
        return accumulate(q.codes, weight.codes).float() / q.scales[:, None] * weight.scales
    return (x.double() @ weight.double().T).float()
