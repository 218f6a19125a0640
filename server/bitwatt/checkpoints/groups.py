"""Ternary weights with a scale to each group of neighbours along a row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from bitwatt_kernels.packing import TernaryWeight, pack
from torch import Tensor

from bitwatt.model.padding import padded

__all__ = ["Groups", "pack_groups", "why_not_by_row"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Ternary weights of some rows, with a scale to each group of neighbours.

    codes   [rows, in_features] int8 in {-1, 0, 1}
    scales  [rows, in_features / group] float32
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def checked(cls, codes: Tensor, scales: Tensor) -> Self:
        """Return them; ValueError if a code is 2, or a scale no finite number."""
        if bool((codes > 1).any()):
            raise ValueError("has a code of 3, which stands for no ternary value")
        if not bool(scales.isfinite().all()):
            raise ValueError("has a scale that is not finite")
        return cls(codes, scales)

    def dequantized(self) -> Tensor:
        """Return the weights, [rows, in_features] float32."""
        rows, num_groups = self.scales.shape
        grouped = self.codes.view(rows, num_groups, -1)
        return (grouped * self.scales[:, :, None]).view(rows, -1)

    def by_row(self) -> tuple[Tensor, Tensor] | None:
        """Return the codes with one scale to each row, [rows]; None where a row has several.

        A group whose weights are all 0 goes with any scale, and a row of such has the first that
        isn't 0, or 0.
        """
        rows, num_groups = self.scales.shape
        has_scale = self.scales != 0
        codes = self.codes.view(rows, num_groups, -1) * has_scale[:, :, None]
        is_used = codes.any(dim=2)
        first = (is_used.int() + has_scale).argmax(dim=1, keepdim=True)
        scales = self.scales.gather(1, first)
        if bool(((self.scales != scales) & is_used).any()):
            return None
        return codes.view(rows, -1), scales[:, 0]


def why_not_by_row(group: int) -> str:
    """Return what refuses a row of several scales."""
    return (
        f"has a scale to each group of {group} weights, and a row several: kernels for these are "
        "not there yet; dense weights of the same values are served (--weights dense)"
    )


def pack_groups(parts: Iterable[Groups], rows: int, columns: int) -> TernaryWeight:
    """Return a matrix of parts, some rows after others, in_features filled to a multiple of 64.

    Raises  ValueError where a row has several scales
    """
    width = padded(columns)
    codes, scales = torch.empty(rows, width // 4, dtype=torch.uint8), torch.empty(rows)
    done = 0
    for part in parts:
        by_row = part.by_row()
        if by_row is None:
            raise ValueError(why_not_by_row(columns // part.scales.shape[1]))
        values, row_scales = by_row
        place = slice(done, done + len(values))
        codes[place] = pack(F.pad(values, (0, width - columns)))
        scales[place] = row_scales
        done += len(values)
    # A row of zeros may say 0: what the others have leaves a matrix of one scale that.
    scales[scales == 0] = scales.abs().max() or 1.0
    return TernaryWeight(codes, scales)
