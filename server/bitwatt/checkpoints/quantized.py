"""A checkpoint of dense linears as one of ternary ones, which its training knew nothing of."""

from pathlib import Path

import torch
import torch.nn.functional as F
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight, pack
from bitwatt_kernels.reference.linear import ternarize
from torch import Tensor

from bitwatt.checkpoints.checkpoint import Checkpoint
from bitwatt.errors import CheckpointError

__all__ = ["QUANTIZED", "QuantizedCheckpoint"]

QUANTIZED = (
    "its ternary weights were made here, of dense ones (--quantize): its quality is not that of a "
    "trained ternary model"
)
"""What callers and operators are told of such a model."""


class QuantizedCheckpoint:
    """A checkpoint whose linears are ternarized as they are read, a scale to each matrix.

    Embedding, head, norms and biases are the checkpoint's own.
    Source  BitNet b1.58, arXiv:2402.17764, section 2: the scale is the mean magnitude
    """

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        """Take the checkpoint at path; raises CheckpointError where its linears are ternary."""
        if checkpoint.why_dense is None:
            raise CheckpointError(
                f"{path}: the linears are ternary already ({checkpoint.stored_as}): leave out "
                "--quantize"
            )
        self.config = checkpoint.config
        self.is_ternary = True
        self.why_dense: str | None = None
        self.notices = checkpoint.notices
        self.notices.append(QUANTIZED)
        self.stored_as = f"{checkpoint.stored_as}, ternarized by their mean magnitude"
        self._checkpoint = checkpoint
        self._path = path

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        return self._checkpoint.dense(name, *shape, fits=fits)

    def stores_ternary(self, _name: str, /) -> bool:
        return False

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        weight = self.dense(f"{name}.weight", out_features, in_features, fits=fits)
        values, scale = ternarize(weight)
        if not bool((scale * in_features).to(fits).isfinite()):
            raise CheckpointError(
                f"{self._path}: tensor '{name}.weight' makes weights of {float(scale):.3g}, whose "
                f"sums are too large for {fits}"
            )
        codes = pack(F.pad(values, (0, -in_features % IN_FEATURES_MULTIPLE)))
        return TernaryWeight(codes, scale.expand(out_features).contiguous())

    def check_all_read(self) -> None:
        """Raise CheckpointError if the checkpoint holds a tensor that no one asked for."""
        self._checkpoint.check_all_read()
