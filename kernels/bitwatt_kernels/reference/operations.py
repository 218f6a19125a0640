"""The operations that every backend of plain torch has alike."""

from typing import Literal

import torch
from torch import Tensor

from bitwatt_kernels.backend import Activation, QuantizedActivations
from bitwatt_kernels.layer import LayersByOperations
from bitwatt_kernels.reference import elementwise as _elementwise
from bitwatt_kernels.reference import linear as _linear
from bitwatt_kernels.reference.head import Int8Head, quantize_head

__all__ = ["TorchOperations"]


class TorchOperations(LayersByOperations):
    """Norms, activation functions and quantization of the Backend protocol."""

    device: torch.device

    def prepare_head(self, weight: Tensor, *, bits: Literal[8, 16] = 16) -> Tensor | Int8Head:
        weight = weight.to(self.device, copy=bits == 16)
        return quantize_head(weight) if bits == 8 else weight.contiguous()

    def quantize(self, x: Tensor, *, group: int | None = None) -> QuantizedActivations:
        return _linear.quantize(x, group=group)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _elementwise.rms_norm(x, weight, eps)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, *, group: int | None = None
    ) -> QuantizedActivations:
        return _elementwise.rms_norm_quantize(x, weight, eps, group=group)

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return _elementwise.gated_activation(gate_up, activation)

    def gated_activation_quantize(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        *,
        group: int | None = None,
    ) -> QuantizedActivations:
        return _elementwise.gated_activation_quantize(gate_up, activation, weight, eps, group=group)
