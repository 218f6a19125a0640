"""The Triton kernels as a Backend."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels.backend import (
    Activation,
    HeadNorms,
    LayerWeights,
    QuantizedActivations,
    StepLayout,
    TernaryHead,
)
from bitwatt_kernels.gpu import attention as _attention
from bitwatt_kernels.gpu import compiling
from bitwatt_kernels.gpu import dense as _dense
from bitwatt_kernels.gpu import drawing as _drawing
from bitwatt_kernels.gpu import elementwise as _elementwise
from bitwatt_kernels.gpu import head as _head
from bitwatt_kernels.gpu import linear as _linear
from bitwatt_kernels.gpu import rope as _rope
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.few_tokens import are_fusable, run_layers
from bitwatt_kernels.gpu.grouped_linear import GroupedWeight, grouped_linear
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.persistent import PersistentLayers
from bitwatt_kernels.layer import LayersByOperations, ternary_head
from bitwatt_kernels.packing import TernaryWeight, unpack_rows

__all__ = ["TritonBackend"]


class TritonBackend(LayersByOperations):
    """Every operation of the Backend protocol on an NVIDIA GPU.

    No operation waits for the device or reads its memory, so that a step can be captured into a
    CUDA graph. Use it from one stream at a time: split reductions share their counters.
    """

    name = "triton"

    def __init__(
        self,
        device: torch.device,
        *,
        batch_invariant: bool = True,
        persistent_step: bool = False,
    ) -> None:
        """Raises BackendError if device is not a GPU of compute capability 8.0 or later.

        batch_invariant  sum dense matmuls in a fixed order; else cuBLAS chooses one by the batch
        persistent_step  run all layers of a step that decodes a few tokens in one kernel
        """
        self.gpu = Gpu(device)
        self.device = device
        self.batch_invariant = batch_invariant
        self.persistent_step = persistent_step

    def compile_together(self, call: Callable[[], object]) -> None:
        """Compile, in parallel, the kernels that call launches; it launches none this time."""
        if self.device.type == "cuda":
            compiling.compile_together(call, lambda: torch.cuda.set_device(self.gpu.device))

    def prepare_ternary(self, weight: TernaryWeight) -> TernaryWeight | GroupedWeight:
        if weight.group is not None:
            return GroupedWeight.of(weight, self.device)
        bias = None if weight.bias is None else weight.bias.to(self.device)
        codes = weight.codes.to(self.device).contiguous()
        return TernaryWeight(codes, weight.scales.to(self.device), bias)

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        if self.persistent_step:
            return PersistentLayers(layers, self.gpu)
        return super().prepare_layers(layers)

    def prepare_head(self, weight: Tensor, *, bits: Literal[8, 16] = 16) -> Tensor | _head.Int8Head:
        weight = weight.to(self.device, copy=bits == 16).contiguous()
        return _head.quantize_head(weight) if bits == 8 else weight

    def prepare_dense(self, weight: Tensor) -> Tensor:
        return weight.to(self.device).contiguous()

    def nbytes(self, prepared: object) -> int:
        match prepared:
            case TernaryHead():
                return self.nbytes(prepared.weight)
            case TernaryWeight():
                tensors = [prepared.codes, prepared.scales, prepared.bias]
                return sum(t.nbytes for t in tensors if t is not None)
            case GroupedWeight():
                return prepared.nbytes
            case _head.Int8Head():
                return int(prepared.codes.nbytes + prepared.scales.nbytes)
            case Tensor():
                return int(prepared.nbytes)
            case _:
                raise TypeError(f"{type(prepared).__name__} was not prepared by this backend")

    def embed(self, token_ids: Tensor, embedding: object) -> Tensor:
        if isinstance(embedding, TernaryHead):
            weight = embedding.weight
            if isinstance(weight, GroupedWeight):
                return weight.rows(token_ids, embedding.dtype)
            return unpack_rows(weight, token_ids, embedding.dtype)
        assert isinstance(embedding, Tensor | _head.Int8Head)
        return _head.embed(token_ids, embedding)

    def quantize(self, x: Tensor, *, group: int | None = None) -> QuantizedActivations:
        return _elementwise.quantize(x, self.gpu, group=group)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _elementwise.rms_norm(x, weight, eps, self.gpu)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, *, group: int | None = None
    ) -> QuantizedActivations:
        return _elementwise.rms_norm_quantize(x, weight, eps, self.gpu, group=group)

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return _elementwise.gated_activation(gate_up, activation, self.gpu)

    def gated_activation_quantize(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        *,
        group: int | None = None,
    ) -> QuantizedActivations:
        return _elementwise.gated_activation_quantize(
            gate_up, activation, weight, eps, self.gpu, group=group
        )

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(weight, GroupedWeight):
            return grouped_linear(x, weight, residual, dtype, self.gpu)
        assert isinstance(weight, TernaryWeight)
        return _linear.ternary_linear(x, weight, residual, dtype, self.gpu)

    def dense_linear(
        self, x: Tensor, weight: object, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        assert isinstance(weight, Tensor)
        if self.batch_invariant or INTERPRETED:
            return _dense.dense_linear(x, weight, bias, residual, self.gpu)
        if residual is None:
            return F.linear(x, weight, bias)
        y = torch.addmm(residual, x, weight.T)
        return y if bias is None else y.add_(bias)

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        if isinstance(layers, PersistentLayers):
            if self.persistent_step and layers.can_run(h, layout):
                return layers.run(h, rope, kv_caches, layout)
            layers = layers.layers
        assert isinstance(layers, tuple)
        if len(h) and are_fusable(layers):
            return run_layers(h, layers, rope, kv_caches, layout, self.gpu)
        return super().ternary_layers(h, layers, rope, kv_caches, layout)

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        return _rope.rope_and_cache(qkv, rope, kv_cache, layout, num_heads, self.gpu, head_norms)

    def attention(
        self, queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float
    ) -> Tensor:
        return _attention.attention(queries, kv_cache, layout, scale, self.gpu)

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        """Give the tokens that a row's mask lacks a logit of -inf, in place.

        logits  [.., vocab_size] float32
        rows    M of logits' rows, each once
        bits    [M, words] int32: a bit a token, the lowest first, for vocab_size at least
        """
        mask_of = torch.full([len(logits)], -1)
        mask_of[list(rows)] = torch.arange(len(rows))
        if self.device.type == "cuda":
            mask_of = mask_of.pin_memory()
        _drawing.mask(logits, mask_of.to(self.device, non_blocking=True), bits)

    def draw_tokens(
        self, logits: Tensor, settings: Tensor, bits: Tensor | None, best: Tensor | None = None
    ) -> Tensor:
        """Return a token for each row of logits, [R] int64; see gpu.drawing.draw.

        bits  [M, words] int32, masks as mask_logits takes them, of which the last of a row's
              settings names one, or -1; logits are masked by them in place. None where no row has
              one
        """
        if bits is not None:
            _drawing.mask(logits, settings[:, 5].long(), bits)
        return _drawing.draw(logits, settings, self.gpu, best)

    def head(self, x: Tensor, weight: object) -> Tensor:
        if isinstance(weight, TernaryHead):
            return ternary_head(self, x, weight)
        assert isinstance(weight, Tensor | _head.Int8Head)
        return _head.head(x, weight, self.gpu, batch_invariant=self.batch_invariant)

    def head_and_best(self, x: Tensor, weight: object, out: Tensor) -> Tensor | None:
        """Write head's logits to out, [T, vocab_size] float32; return what draw takes as best."""
        if isinstance(weight, TernaryHead):
            out.copy_(ternary_head(self, x, weight))
            return None
        assert isinstance(weight, Tensor | _head.Int8Head)
        return _head.head_and_best(x, weight, out, self.gpu, batch_invariant=self.batch_invariant)
