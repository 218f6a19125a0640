"""The CPU backend of machines where the native kernels can't be built: plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwatt_kernels.backend import HeadNorms, QuantizedActivations, StepLayout, TernaryHead
from bitwatt_kernels.cpu.dense import has_blocked_kernels, int8_matmul, linear, tiled_linear
from bitwatt_kernels.cpu.torch_attention import AttentionPlan
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.layer import ternary_head
from bitwatt_kernels.packing import TernaryWeight, group_of, times_scales, unpack
from bitwatt_kernels.reference.head import Int8Head, embed
from bitwatt_kernels.reference.linear import sum_groups
from bitwatt_kernels.reference.operations import TorchOperations

__all__ = ["TorchBackend"]


@dataclass(frozen=True, slots=True)
class _Int8Weight:
    """A ternary matrix unpacked to int8, four times its packed size.

    values  [in_features, out_features] int8, a transposed view
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    @property
    def group(self) -> int | None:
        return group_of(self.scales, len(self.values))


class TorchBackend(TorchOperations):
    """Ternary linears as exact int8 matmuls; attention, norms and 16-bit matmuls of torch.

    Attention's plan is worked out from a layout's tensors at the first layer that brings it, and
    kept for the others: a step has a layout object of its own, unchanged until its last layer.
    Not thread-safe.
    """

    name = "torch"

    def __init__(self, device: torch.device, *, batch_invariant: bool = True) -> None:
        if device.type != "cpu":
            raise BackendError(f"the torch backend runs on a CPU, not on {device}")
        self.device = device
        self.batch_invariant = batch_invariant
        self._last_plan: AttentionPlan | None = None

    def prepare_ternary(self, weight: TernaryWeight) -> _Int8Weight:
        bias = None if weight.bias is None else weight.bias.to(self.device)
        values = unpack(weight.codes.to(self.device)).T
        return _Int8Weight(values, weight.scales.to(self.device), bias)

    def prepare_dense(self, weight: Tensor) -> Tensor:
        """Return the weight blocked as oneDNN's 16-bit kernels want it, where the CPU has them.

        On a Zen 4 core one token takes 5.6 ms instead of 9.1 through 2560 → 13824, 38 µs instead
        of 73 through 512 → 1536; a prompt's 256 take the same.
        """
        weight = weight.to(self.device)
        if not has_blocked_kernels(weight.dtype):
            return weight
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return blocked

    def nbytes(self, prepared: object) -> int:
        match prepared:
            case TernaryHead():
                return self.nbytes(prepared.weight)
            case _Int8Weight():
                tensors = [prepared.values, prepared.scales, prepared.bias]
                return sum(t.nbytes for t in tensors if t is not None)
            case Tensor():
                return prepared.numel() * prepared.element_size()
            case Int8Head():
                return prepared.nbytes
            case _:
                raise TypeError(f"{type(prepared).__name__} was not prepared by this backend")

    def embed(self, token_ids: Tensor, embedding: object) -> Tensor:
        if isinstance(embedding, TernaryHead):
            weight = embedding.weight
            assert isinstance(weight, _Int8Weight)
            rows = times_scales(weight.values.T[token_ids].float(), weight.scales[token_ids])
            return rows.to(embedding.dtype)
        assert isinstance(embedding, Tensor | Int8Head)
        return embed(token_ids, embedding)

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(weight, _Int8Weight)
        x.check_fit(len(weight.values), weight.group)
        # torch.ops.onednn.qlinear_pointwise is as exact and, where oneDNN has kernels for it, 2.5
        # times as fast on one token (Xeon with AMX). Where not, it runs reference loops: on a
        # Zen 4 a 2560² matrix takes 213 ms instead of 0.09. So it isn't used.
        if weight.group is None:
            y = int8_matmul(x.codes, weight.values, largest=1)
            y.div_(x.scales[:, None]).mul_(weight.scales)
        else:
            groups = zip(
                torch.split(x.codes, weight.group, 1),
                torch.split(weight.values, weight.group),
                strict=True,
            )
            y = sum_groups(
                (int8_matmul(codes, values, largest=1) for codes, values in groups),
                x,
                weight.scales,
            )
        if weight.bias is not None:
            y.add_(weight.bias)
        if residual is not None:
            y.add_(residual)
        return y.to(dtype)

    def dense_linear(
        self, x: Tensor, weight: object, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        assert isinstance(weight, Tensor)
        if not self.batch_invariant:
            y = linear(x, weight, bias)
        else:
            y = tiled_linear(x, weight)
            if bias is not None:
                y = y + bias
        return y if residual is None else y + residual

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        return self._plan(layout, kv_cache).rope_and_cache(
            qkv, rope, kv_cache, num_heads, head_norms
        )

    def attention(
        self, queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float
    ) -> Tensor:
        return self._plan(layout, kv_cache).attention(
            queries, kv_cache, scale, is_exact=self.batch_invariant
        )

    def head(self, x: Tensor, weight: object) -> Tensor:
        if isinstance(weight, TernaryHead):
            return ternary_head(self, x, weight)
        if isinstance(weight, Int8Head):
            q = self.quantize(x)
            logits = int8_matmul(q.codes, weight.codes.T, largest=127)
            return logits.div_(q.scales[:, None]).mul_(weight.scales)
        assert isinstance(weight, Tensor)
        return self.dense_linear(x, weight, None, None).float()

    def _plan(self, layout: StepLayout, kv_cache: Tensor) -> AttentionPlan:
        plan, num_kv_heads = self._last_plan, kv_cache.shape[2]
        if plan is None or plan.layout is not layout or plan.num_kv_heads != num_kv_heads:
            plan = self._last_plan = AttentionPlan(layout, num_kv_heads)
        return plan
