"""Plain torch, written to be read: the oracle every other backend is checked against."""

import torch
from torch import Tensor

from bitwatt_kernels.backend import HeadNorms, QuantizedActivations, StepLayout, TernaryHead
from bitwatt_kernels.layer import ternary_head
from bitwatt_kernels.packing import TernaryWeight, unpack_rows
from bitwatt_kernels.reference import attention as _attention
from bitwatt_kernels.reference import linear as _linear
from bitwatt_kernels.reference.head import Int8Head
from bitwatt_kernels.reference.head import embed as _embed
from bitwatt_kernels.reference.head import head as _head
from bitwatt_kernels.reference.operations import TorchOperations

__all__ = ["ReferenceBackend"]


class ReferenceBackend(TorchOperations):
    """Every operation of the Backend protocol, exact where it is integer, float64 where it sums.

    Works on any device and dtype; keeps weights packed and unpacks them on every call.
    """

    name = "reference"

    def __init__(self, device: torch.device, *, batch_invariant: bool = True) -> None:
        self.device = device
        self.batch_invariant = batch_invariant  # always so

    def prepare_ternary(self, weight: TernaryWeight) -> TernaryWeight:
        bias = None if weight.bias is None else weight.bias.to(self.device)
        return TernaryWeight(weight.codes.to(self.device), weight.scales.to(self.device), bias)

    def prepare_dense(self, weight: Tensor) -> Tensor:
        return weight.to(self.device)

    def nbytes(self, prepared: object) -> int:
        match prepared:
            case TernaryHead():
                return self.nbytes(prepared.weight)
            case TernaryWeight():
                tensors = [prepared.codes, prepared.scales, prepared.bias]
                return sum(t.nbytes for t in tensors if t is not None)
            case Tensor() | Int8Head():
                return int(prepared.nbytes)
            case _:
                raise TypeError(f"{type(prepared).__name__} was not prepared by this backend")

    def embed(self, token_ids: Tensor, embedding: object) -> Tensor:
        if isinstance(embedding, TernaryHead):
            return unpack_rows(embedding.weight, token_ids, embedding.dtype)
        assert isinstance(embedding, Tensor | Int8Head)
        return _embed(token_ids, embedding)

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(weight, TernaryWeight)
        return _linear.ternary_linear(x, weight, residual, dtype)

    def dense_linear(
        self, x: Tensor, weight: object, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        assert isinstance(weight, Tensor)
        y = x.double() @ weight.double().T
        for term in (bias, residual):
            if term is not None:
                y = y + term.double()
        return y.to(x.dtype)

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        return _attention.rope_and_cache(qkv, rope, kv_cache, layout, num_heads, head_norms)

    def attention(
        self, queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float
    ) -> Tensor:
        return _attention.attention(queries, kv_cache, layout, scale)

    def head(self, x: Tensor, weight: object) -> Tensor:
        if isinstance(weight, TernaryHead):
            return ternary_head(self, x, weight)
        assert isinstance(weight, Tensor | Int8Head)
        return _head(x, weight)
