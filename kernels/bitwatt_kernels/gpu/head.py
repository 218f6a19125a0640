"""The head's two forms: the checkpoint's own 16-bit matrix, or int8 with a scale a token id."""

import torch
from torch import Tensor

from bitwatt_kernels.gpu.dense import dense_linear, int8_linear, linear_and_best
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import quantize
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.reference.head import Int8Head, embed, quantize_head

__all__ = ["Int8Head", "embed", "head", "head_and_best", "quantize_head"]


def head(x: Tensor, weight: Tensor | Int8Head, gpu: Gpu, *, batch_invariant: bool) -> Tensor:
    """Return logits [T, vocab_size] float32 of x [T, hidden_size].

    batch_invariant  sum in a fixed order; else cuBLAS may choose one by T
    """
    if isinstance(weight, Int8Head):
        return int8_linear(quantize(x, gpu), weight.codes, weight.scales, gpu)
    x = x.to(weight.dtype)
    if batch_invariant or INTERPRETED:
        return dense_linear(x, weight, None, None, gpu, dtype=torch.float32)
    if weight.dtype == torch.float32:
        return torch.mm(x, weight.T)
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def head_and_best(
    x: Tensor, weight: Tensor | Int8Head, out: Tensor, gpu: Gpu, *, batch_invariant: bool
) -> Tensor | None:
    """Write head's logits to out; return the best of each tile, None where cuBLAS sums."""
    if isinstance(weight, Int8Head):
        return linear_and_best(quantize(x, gpu), weight.codes, weight.scales, out, gpu)
    if batch_invariant or INTERPRETED:
        return linear_and_best(x.to(weight.dtype), weight, None, out, gpu)
    out.copy_(head(x, weight, gpu, batch_invariant=False))
    return None
