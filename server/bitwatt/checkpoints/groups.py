"""Ternary weights with a scale to each group of neighbours along a row."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import Self

import torch
import torch.nn.functional as F
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight, pack
from torch import Tensor

from bitwatt.model.padding import padded

__all__ = ["FLOATS", "Groups", "largest_sums", "pack_groups", "why_not_by_group"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What weights and scales are read of; torch computes with no smaller floats."""

_LARGEST_GROUP = 128


@dataclass(frozen=True, slots=True)
class Groups:
    """Ternary weights of some rows, with a scale to each group of neighbours.

    codes   [rows, in_features] int8 in {-1, 0, 1}
    scales  [rows, in_features / group] float32 or float16, as stored
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def checked(cls, codes: Tensor, scales: Tensor) -> Self:
        """Return them; ValueError if a code is 2, or a scale no finite number."""
        if int(codes.max()) > 1:  # 40 GB/s on a core of an EPYC; any() 0.8
            raise ValueError("has a code of 3, which stands for no ternary value")
        if not bool(scales.isfinite().all()):
            raise ValueError("has a scale that is not finite")
        return cls(codes, scales)

    def dequantized(self) -> Tensor:
        """Return the weights, [rows, in_features] float32."""
        rows, num_groups = self.scales.shape
        grouped = self.codes.view(rows, num_groups, -1)
        return (grouped * self.scales.float()[:, :, None]).view(rows, -1)

    def by_row(self) -> tuple[Tensor, Tensor] | None:
        """Return the codes with one scale to each row, [rows]; None where a row has several.

        A group whose weights are all 0 goes with any scale, and a row of such has the first that
        isn't 0, or 0.
        """
        rows, num_groups = self.scales.shape
        has_scale = self.scales != 0
        codes = self.codes.view(rows, num_groups, -1) * has_scale[:, :, None]
        is_used = codes.abs().amax(dim=2) > 0  # 6 GB/s on a core of an EPYC; any() 0.4
        first = (is_used.int() + has_scale).argmax(dim=1, keepdim=True)
        scales = self.scales.gather(1, first)
        if bool(((self.scales != scales) & is_used).any()):
            return None
        return codes.view(rows, -1), scales[:, 0]


def why_not_by_group(group: int) -> str | None:
    """Return what refuses a scale to every group weights of a row; None where nothing does."""
    if group % IN_FEATURES_MULTIPLE == 0:
        return None
    return (
        f"has a scale to each group of {group} weights, and a row several: the kernels take groups "
        f"of multiples of {IN_FEATURES_MULTIPLE}; dense weights of the same values are served "
        "(--weights dense)"
    )


def pack_groups(parts: Iterable[Groups], rows: int, columns: int) -> TernaryWeight:
    """Return a matrix of parts, some rows after others, in_features filled to a multiple of 64.

    Each row has one scale, in float32, where that says all; else each group has, as stored, and one
    of more than 128 weights counts as several: activations have the same groups, and smaller ones
    round less. Groups of 64 whose neighbours have the same scales are groups of 128.

    Raises  ValueError where there must be groups, and they are no multiple of 64
    """
    width = padded(columns)
    codes, by_row = torch.empty(rows, width // 4, dtype=torch.uint8), torch.empty(rows)
    by_group: list[Tensor] = []
    is_by_row, done = True, 0
    for part in parts:
        place = slice(done, done + len(part.codes))
        one_each = part.by_row()
        if one_each is None:
            is_by_row, values = False, part.codes
        else:
            values, by_row[place] = one_each
        by_group.append(part.scales)
        codes[place] = pack(F.pad(values, (0, width - columns)))
        done = place.stop
    if is_by_row:
        # A row of zeros may say 0: what the others have leaves a matrix of one scale that.
        by_row[by_row == 0] = by_row.abs().max() or 1.0
        return TernaryWeight(codes, by_row)
    scales = _folded(torch.cat(by_group), columns)
    group = columns // scales.shape[1]
    if reason := why_not_by_group(group):
        raise ValueError(reason)
    smaller = gcd(group, _LARGEST_GROUP)
    return TernaryWeight(codes, scales.repeat_interleave(group // smaller, dim=1))


def _folded(scales: Tensor, columns: int) -> Tensor:
    """Return scales of groups of 128 where neighbours of 64 have the same throughout the matrix.

    Weights trained with groups of 128 and stored with 64, as llama.cpp's Q2_0 has them, are so.
    """
    rows, num_groups = scales.shape
    if num_groups % 2 or columns // num_groups * 2 != _LARGEST_GROUP:
        return scales
    pairs = scales.view(rows, num_groups // 2, 2)
    return pairs[:, :, 0].contiguous() if torch.equal(pairs[:, :, 0], pairs[:, :, 1]) else scales


def largest_sums(weight: TernaryWeight, in_features: int) -> Tensor:
    """Return what the magnitudes of each row add up to at most, [rows]; signed as an only scale."""
    if weight.group is None:
        return weight.scales * in_features
    return weight.scales.float().abs().sum(dim=1) * weight.group
