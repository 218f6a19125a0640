"""Folders of MLX whose 2-bit groups are ternary: a weight is (q − 1) · scale.

MLX's affine quantization has w = q · scale + bias, with a scale and a bias to each group of a row.
It is ternary where each bias is its scale's negative and no q is 3.

Source  github.com/ml-explore/mlx, mlx.core.quantize
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwatt.checkpoints.groups import FLOATS, Groups
from bitwatt.checkpoints.safetensors import SafetensorsFolder
from bitwatt.errors import CheckpointError, shorten

__all__ = ["MlxTensors", "check_quantization"]

_CHUNK_WEIGHTS = 1 << 20
_CODES_A_WORD = 16
_GROUP_SIZES = (32, 64, 128)


def check_quantization(quantization: Any) -> int:
    """Return the weights of a group, of what config.json has under quantization.

    Raises  CheckpointError for another quantization than affine groups of 2 bits
    """
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization is {shorten(quantization)}; expected an object")
    unknown = set(quantization) - {"group_size", "bits", "mode"}
    if unknown:  # layers with a quantization of their own
        raise CheckpointError(f"not supported: quantization of {shorten(min(unknown))}")
    given = quantization.get("bits"), quantization.get("mode", "affine")
    if given != (2, "affine"):
        raise CheckpointError(
            f"quantization has bits={shorten(given[0])} and mode={shorten(given[1])}; "
            "2 and 'affine' are supported, where they are ternary"
        )
    group = quantization.get("group_size")
    if type(group) is not int or group not in _GROUP_SIZES:
        raise CheckpointError(
            f"quantization has group_size {shorten(group)}; "
            f"{', '.join(map(str, _GROUP_SIZES))} are supported"
        )
    return group


class MlxTensors:
    """The tensors of an MLX folder by their names, as SafetensorsFolder hands them out.

    A quantized one is there as the matrix of its weights, in the dtype of its scales, which has
    them exactly; its scales and biases are not there.

    group  how many weights share a scale
    """

    def __init__(self, folder: Path, group: int) -> None:
        self._stored = SafetensorsFolder(folder)
        self.group = group
        self.notices = self._stored.notices
        self.grouped = {
            name
            for name in self._stored
            if name.endswith(".weight") and _beside(name, "scales") in self._stored
        }
        hidden = {_beside(name, part) for name in self.grouped for part in ("scales", "biases")}
        self._names = [name for name in self._stored if name not in hidden]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def path(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._stored.path(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape."""
        shape = self._stored.shape(name)
        if name not in self.grouped or not shape:
            return shape
        return (*shape[:-1], shape[-1] * _CODES_A_WORD)

    def read(self, name: str) -> Tensor:
        """Return the tensor, which may be a view of the mapped file."""
        if name not in self.grouped:
            return self._stored.read(name)
        dtype = self._stored.read(_beside(name, "scales")).dtype
        return torch.cat([part.dequantized().to(dtype) for part in self.groups(name)])

    def is_grouped(self, name: str) -> bool:
        """Return whether the tensor is stored as groups."""
        return name in self.grouped

    def groups(self, name: str, num_rows: int | None = None) -> Iterator[Groups]:
        """Yield the rows of a tensor that is stored as groups, or the first ones, some at a time.

        Raises  CheckpointError where they aren't ternary
        """
        words, scales, biases = (
            self._stored.read(part)
            for part in (name, *(_beside(name, x) for x in ("scales", "biases")))
        )
        rows, columns = (words.shape[0], self.shape(name)[1]) if words.dim() == 2 else (0, 0)
        expected = (rows, columns // self.group)
        if words.dtype != torch.uint32 or not rows * columns or columns % self.group:
            raise self._error(
                name,
                f"is {words.dtype} {list(words.shape)}; expected uint32 words "
                f"of rows of groups of {self.group}",
            )
        for part in (scales, biases):
            if part.shape != expected or part.dtype not in FLOATS:
                raise self._error(
                    name,
                    f"has scales or biases of {part.dtype} {list(part.shape)}; "
                    f"expected 16- or 32-bit floats {list(expected)}",
                )
        if scales.dtype != torch.float16:
            scales = scales.float()
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows if num_rows is None else num_rows, step):
            place = slice(start, start + step if num_rows is None else num_rows)
            if not torch.equal(biases[place], -scales[place]):
                raise self._error(
                    name,
                    "has biases that are not its scales' negatives: its groups are not ternary",
                )
            data = words[place].contiguous().view(torch.uint8)  # little-endian
            codes = torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
            try:
                yield Groups.checked(codes.flatten(1).to(torch.int8) - 1, scales[place])
            except ValueError as error:
                raise self._error(name, str(error)) from error

    def _error(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path(name)}: tensor {shorten(name)} {reason}")


def _beside(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}"
