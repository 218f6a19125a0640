"""Floats that are exactly ternary: a row, or each group of neighbours along it, has one magnitude.

Ternary models are published so, for programs that know no packed weights. They are packed without
loss: W = t · scale, bit for bit.
"""

from collections.abc import Iterator

import torch
from bitwatt_kernels.packing import TernaryWeight
from torch import Tensor

from bitwatt.checkpoints.groups import FLOATS, Groups, pack_groups

__all__ = ["EXACT_FLOATS", "NOT_EXACT", "looks_ternary", "pack_exactly"]

EXACT_FLOATS = "floats that are exactly ternary; W = t · scale"
NOT_EXACT = (
    "has rows of more than one magnitude a group of 128 or 64, though its first ones are ternary: "
    "serve it as dense (--weights dense)"
)
"""What ends the reading of a matrix that isn't what its first rows are."""

_GROUPS = (128, 64)
_CHUNK_WEIGHTS = 1 << 20
_NUM_LOOKED_AT = 4  # rows; four of random floats with one magnitude each are no accident


class _OtherRuleError(Exception):
    """The weights have another scale rule."""


def looks_ternary(weight: Tensor) -> bool | None:
    """Return whether the first rows are exactly ternary; None where they are all zeros.

    weight  of any shape and dtype: what is no matrix of 16- or 32-bit floats isn't ternary
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        return False
    rows = weight[:_NUM_LOOKED_AT]
    if not bool(rows.any()):
        return None
    return any(_as_groups(rows, group) is not None for group in _group_sizes(weight.shape[1]))


def pack_exactly(weight: Tensor) -> TernaryWeight | None:
    """Return a matrix of floats packed, in_features filled to a multiple of 64; None if it isn't.

    weight  [rows, columns], 16- or 32-bit floats
    Raises  ValueError for a scale that is no finite number
    """
    rows, columns = weight.shape
    for group in _group_sizes(columns):
        try:
            return pack_groups(_parts(weight, group), rows, columns)
        except _OtherRuleError:
            continue
    return None


def _group_sizes(columns: int) -> list[int]:
    """Return the groups that a row may have, the row itself before all."""
    return [columns, *(group for group in _GROUPS if columns % group == 0 and group < columns)]


def _parts(weight: Tensor, group: int) -> Iterator[Groups]:
    for rows in torch.split(weight, max(1, _CHUNK_WEIGHTS // weight.shape[1])):
        groups = _as_groups(rows, group)
        if groups is None:
            raise _OtherRuleError
        yield groups


def _as_groups(rows: Tensor, group: int) -> Groups | None:
    grouped = rows.reshape(len(rows), -1, group)
    scales = grouped.abs().amax(dim=2)
    codes = grouped.sign()
    if not bool((codes * scales[:, :, None] == grouped).all()):
        return None
    if scales.dtype != torch.float16:
        scales = scales.float()
    return Groups.checked(codes.flatten(1).char(), scales)
