"""What a checkpoint's tensors hold, found while a model of their shapes is built without them."""

from dataclasses import dataclass

import torch
from bitwatt_kernels.packing import TernaryWeight, unpack
from torch import Tensor

from bitwatt.checkpoints.checkpoint import Checkpoint
from bitwatt.errors import CheckpointError
from bitwatt.model.padding import padded

__all__ = ["Matrix", "Survey"]

# Masters of mean magnitude 0.02 have that scale, the reciprocal being 50; 2B4T's are near 1.
_INVERTED_SCALE = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A ternary linear, embedding or head.

    minus, zero, plus  shares of -1, 0 and +1
    lowest, highest    scale
    scales             what share one: a tensor's weights, a row's, or a number of neighbours in it
    """

    name: str
    out_features: int
    in_features: int
    minus: float
    zero: float
    plus: float
    lowest: float
    highest: float
    scales: str


class Survey:
    """A checkpoint as a TensorSource: each tensor is read once, judged, and handed out empty.

    What it hands out is on torch's device "meta", with the shape and the dtype of the tensor's. One
    that can't be read as it is asked for is noted, and handed out all the same.

    matrices    ternary linears, embedding and head, in the order of reading
    parameters  numbers by tensor, by name
    refused     what loading would end at
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.is_ternary = checkpoint.why_dense is None  # each linear is counted once
        self.notices: list[str] = []  # of building, once a backend: the checkpoint has its own
        self.matrices: list[Matrix] = []
        self.parameters: dict[str, int] = {}
        self.refused: list[str] = []
        self._checkpoint = checkpoint
        self._dense: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._ternary: dict[str, TernaryWeight] = {}

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        if (name, shape) not in self._dense:
            self.parameters[name] = torch.Size(shape).numel()
            dtype = fits
            try:
                dtype = self._checkpoint.dense(name, *shape, fits=fits).dtype
            except CheckpointError as error:
                self.refused.append(str(error))
            self._dense[name, shape] = torch.empty(shape, dtype=dtype, device="meta")
        return self._dense[name, shape]

    def stores_ternary(self, name: str, /) -> bool:
        return self._checkpoint.stores_ternary(name)

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        if name not in self._ternary:
            columns = padded(in_features) // 4
            codes = torch.empty(out_features, columns, dtype=torch.uint8, device="meta")
            scales = torch.empty(out_features, device="meta")
            try:
                weight = self._checkpoint.ternary(name, out_features, in_features, fits=fits)
                self.matrices.append(_matrix(name, weight, in_features))
                self.parameters[f"{name}.weight"] = out_features * in_features
                scales = weight.scales.to("meta")
            except CheckpointError as error:
                self.refused.append(str(error))
            self._ternary[name] = TernaryWeight(codes, scales)
        return self._ternary[name]

    def finish(self) -> None:
        """Note tensors that have no place, where all that have one could be read."""
        try:
            self._checkpoint.check_all_read()
        except CheckpointError as error:
            self.refused.append(str(error))

    @property
    def warnings(self) -> list[str]:
        """What reading has found that an operator should know."""
        scales = sorted(abs(m.highest) for m in self.matrices)
        found = list(dict.fromkeys(self._checkpoint.notices))
        if scales and (median := scales[len(scales) // 2]) > _INVERTED_SCALE:
            found.append(
                f"the scales look inverted: half of the matrices have weights of ±{median:.3g} and "
                f"more, where ±{1 / median:.3g} is usual; {self._checkpoint.stored_as} is how they "
                "are read"
            )
        return found


def _matrix(name: str, weight: TernaryWeight, in_features: int) -> Matrix:
    values = unpack(weight.codes)[:, :in_features]
    minus, plus = (int((values == value).sum()) / values.numel() for value in (-1, 1))
    lowest, highest = (float(bound) for bound in weight.scales.aminmax())
    return Matrix(
        name=name,
        out_features=weight.out_features,
        in_features=in_features,
        minus=minus,
        zero=1 - minus - plus,
        plus=plus,
        lowest=lowest,
        highest=highest,
        scales=f"{weight.group} weights"
        if weight.group
        else "tensor"
        if lowest == highest
        else "row",
    )
