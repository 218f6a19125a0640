"""A model whose MLP is made wider by zeros, for kernels that read rows of 64 weights."""

import torch
import torch.nn.functional as F
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight, concatenate_rows, pack
from torch import Tensor

from bitwatt.model.tensor_source import TensorSource

__all__ = ["PaddedSource", "padded"]


def padded(size: int) -> int:
    """Return the next multiple of 64."""
    return -(-size // IN_FEATURES_MULTIPLE) * IN_FEATURES_MULTIPLE


class PaddedSource:
    """A ternary source with intermediate_size filled with zeros to a multiple of 64.

    It computes what the source does. The zeros would lower the mean square that norms before the
    down projection divide by, so the up projection is multiplied by the root of what the width
    grows by, and the last norm's weight divided by it.

    config  the source's own: its intermediate_size isn't padded
    """

    is_ternary = True

    def __init__(self, source: TensorSource) -> None:
        self.config = source.config
        self.notices = source.notices
        self._source = source
        self._inner = source.config.intermediate_size
        self._width = padded(self._inner)
        has_own = self.config.linear_norm_eps is not None
        self._last_norm = ".down_proj.rms_norm" if has_own else ".ffn_sub_norm"
        has_norm = self.config.has_sub_norms or has_own
        self._growth = (self._width / self._inner) ** 0.5 if has_norm else 1.0

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        scales = {
            ".ffn_sub_norm.weight": 1.0,
            f"{self._last_norm}.weight": 1 / self._growth,
            ".gate_proj.bias": 1.0,
            ".up_proj.bias": self._growth,
        }
        scale = next((scales[end] for end in scales if name.endswith(end)), None)
        if scale is None:
            return self._source.dense(name, *shape, fits=fits)
        vector = self._source.dense(name, self._inner, fits=fits)
        return F.pad(vector.float() * scale, (0, self._width - self._inner))

    def stores_ternary(self, name: str, /) -> bool:
        return self._source.stores_ternary(name)

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        if name.endswith(".down_proj"):
            return self._source.ternary(name, out_features, self._inner, fits=fits)
        is_up = name.endswith(".up_proj")
        if not (is_up or name.endswith(".gate_proj")):
            return self._source.ternary(name, out_features, in_features, fits=fits)
        weight = self._source.ternary(name, self._inner, in_features, fits=fits)
        num_rows = self._width - self._inner
        zeros = pack(torch.zeros(num_rows, weight.in_features, dtype=torch.int8))
        scales = weight.scales
        if is_up and self._growth != 1:
            scales = scales.float() * self._growth
        return TernaryWeight(
            concatenate_rows([weight.codes, zeros.to(weight.codes.device)]),
            concatenate_rows([scales, scales.new_zeros(num_rows, *scales.shape[1:])]),
        )
