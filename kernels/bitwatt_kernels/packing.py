"""The one definition of the packed ternary layout: two bits a weight, plane-split.

A row of K weights in {-1, 0, +1} becomes K/4 bytes of codes {0, 1, 2} (weight + 1). Byte j
holds the codes of k = j, j + K/4, j + 2·K/4 and j + 3·K/4 in its bits 0-1, 2-3, 4-5 and 6-7,
so that one shift and one mask turn consecutive bytes into consecutive weights of one plane.
Code 3 never occurs. A scale goes with a whole row, or with each group of neighbours along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import gcd

import torch
from torch import Tensor

from bitwatt_kernels.errors import DtypeError, ShapeError

__all__ = [
    "IN_FEATURES_MULTIPLE",
    "VALID_BYTES",
    "TernaryWeight",
    "concatenate_rows",
    "group_of",
    "pack",
    "times_scales",
    "unpack",
    "unpack_rows",
]

IN_FEATURES_MULTIPLE = 64  # and of a group with a scale of its own

VALID_BYTES = tuple(a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4))
"""The 81 bytes that hold four codes below 3, for drawing random weights."""


@dataclass(frozen=True, slots=True)
class TernaryWeight:
    """A packed ternary matrix with its scales: W[n, k] = (code - 1) · scales[n, k // group].

    codes   [out_features, in_features // 4] uint8, this module's layout
    scales  [out_features] float32, one a row, equal along a matrix and distinct where matrices are
            fused; or [out_features, in_features // group], group a multiple of 64, float32 or
            float16 as files have them
    bias    [out_features] float32, or None
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise DtypeError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}; "
                "expected uint8 [out_features, in_features // 4]"
            )
        for name, tensor in (("scales", self.scales), ("bias", self.bias)):
            if tensor is None:
                continue
            of_groups = name == "scales" and tensor.dim() == 2
            expected = (torch.float32, torch.float16)[: 1 + of_groups]
            if tensor.dtype not in expected:
                names = " or ".join(map(str, expected))
                raise DtypeError(f"{name} are {tensor.dtype}; expected {names}")
            if tensor.shape == (self.out_features,):
                continue
            if name == "bias" or not self._has_groups():
                or_groups = ", or that by two or more groups of whole 64 weights"
                raise ShapeError(
                    f"{name} have shape {list(tensor.shape)}; "
                    f"expected [{self.out_features}]{or_groups if name == 'scales' else ''}"
                )

    def _has_groups(self) -> bool:
        rows, *groups = self.scales.shape
        if rows != self.out_features or len(groups) != 1 or groups[0] < 2:
            return False
        return self.in_features % (groups[0] * IN_FEATURES_MULTIPLE) == 0

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 4

    @property
    def group(self) -> int | None:
        """How many neighbours along a row share a scale; None where a row has one."""
        return group_of(self.scales, self.in_features)

    @classmethod
    def concatenate(cls, weights: "list[TernaryWeight]") -> "TernaryWeight":
        """Return the weights stacked along out_features, each row keeping its own scales.

        Where some have groups all get them, of a size that divides every one of theirs.
        """
        biases = [w.bias for w in weights]
        if all(b is None for b in biases):
            bias = None
        else:
            bias = concatenate_rows(
                [
                    torch.zeros(w.out_features, device=w.codes.device) if w.bias is None else w.bias
                    for w in weights
                ]
            )
        group = gcd(*(w.group or 0 for w in weights))
        scales = [w._scales_by(group) if group else w.scales for w in weights]
        return cls(concatenate_rows([w.codes for w in weights]), concatenate_rows(scales), bias)

    def _scales_by(self, group: int) -> Tensor:
        """Return the scales by smaller groups, [out_features, in_features // group]."""
        scales = self.scales.view(self.out_features, -1)
        return scales.repeat_interleave(self.in_features // group // scales.shape[1], dim=1)


def concatenate_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Return torch.cat of the tensors, without its import of a compiler for those on "meta".

    That takes two seconds, and these have no values, only sizes.
    """
    if not tensors[0].is_meta:
        return torch.cat(list(tensors))
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:], dtype=dtype)


def group_of(scales: Tensor, in_features: int) -> int | None:
    """Return how many of in_features neighbours share a scale; None where a row has one.

    scales  [rows], or [rows, in_features // group]
    """
    return None if scales.dim() == 1 else in_features // scales.shape[1]


def times_scales(values: Tensor, scales: Tensor) -> Tensor:
    """Return values multiplied by their scales, in place.

    values  [out_features, in_features] of a float dtype, contiguous
    scales  [out_features], or [out_features, in_features // group]
    """
    num_groups = 1 if scales.dim() == 1 else scales.shape[1]
    rows, columns = values.shape
    values.view(rows, num_groups, columns // num_groups).mul_(scales.view(rows, num_groups, 1))
    return values


def pack(weight: Tensor) -> Tensor:
    """Return the codes of a ternary matrix.

    weight   [out_features, in_features] int8 in {-1, 0, 1}
    Returns  [out_features, in_features // 4] uint8
    Raises   ShapeError if in_features is not a positive multiple of 64,
             DtypeError if weight is not int8, ValueError on any other value
    """
    if weight.dtype != torch.int8:
        raise DtypeError(f"weight is {weight.dtype}; expected torch.int8")
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[1] % IN_FEATURES_MULTIPLE:
        raise ShapeError(
            f"weight has shape {list(weight.shape)}; expected [out_features, in_features] "
            f"with in_features a multiple of {IN_FEATURES_MULTIPLE}"
        )
    if weight.numel() and (int(weight.min()) < -1 or int(weight.max()) > 1):
        raise ValueError(
            f"weight has values from {int(weight.min())} to {int(weight.max())}; "
            "a ternary weight is -1, 0 or 1"
        )
    planes = (weight + 1).to(torch.uint8).view(weight.shape[0], 4, weight.shape[1] // 4)
    return planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6


def unpack(codes: Tensor) -> Tensor:
    """Return the ternary matrix that `pack` packed.

    codes    [out_features, in_features // 4] uint8
    Returns  [out_features, in_features] int8 in {-1, 0, 1}
    """
    if codes.dtype != torch.uint8:
        raise DtypeError(f"codes are {codes.dtype}; expected torch.uint8")
    planes = [(codes >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
    return torch.cat(planes, dim=1)


def unpack_rows(weight: TernaryWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of the matrix as floats, [len(rows), in_features]: code · scale, rounded once.

    rows  [R] int64, their indexes
    """
    values = unpack(weight.codes[rows]).float()
    return times_scales(values, weight.scales[rows]).to(dtype)
