"""What a model is built from."""

from typing import Protocol

import torch
from bitwatt_kernels.packing import TernaryWeight
from torch import Tensor

from bitwatt.model.config import ModelConfig

__all__ = ["TensorSource"]


class TensorSource(Protocol):
    """The tensors of a model by the names that Hugging Face's LLaMA and BitNet give them.

    A source whose own names differ translates them, as Family.aliases does.

    is_ternary  the linears of the layers are ternary: read them with ternary(), else with dense()
    notices     what reading has found that an operator should know
    """

    config: ModelConfig
    is_ternary: bool
    notices: list[str]

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        """Return a tensor in a float dtype of the source's, its values finite in fits too.

        Raises  CheckpointError if it isn't so
        """
        ...

    def stores_ternary(self, name: str, /) -> bool:
        """Return whether embedding or head, by its module's name, is ternary: read with ternary().

        dense() reads it then, too.
        """
        ...

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        """Return a module's packed weight, in_features filled with zeros to a multiple of 64.

        fits    holds a row's sum of magnitudes
        Raises  CheckpointError if there is no such
        """
        ...
