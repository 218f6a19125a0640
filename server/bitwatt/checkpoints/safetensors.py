"""Tensors of a folder's safetensors files, memory-mapped and checked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwatt.errors import CheckpointError

__all__ = ["SafetensorsFolder", "read_json"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the file's JSON object; CheckpointError if it holds no such."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


class SafetensorsFolder:
    """The tensors of model.safetensors, or of the files that its index names.

    Opening maps the files; the library checks each header, and its offsets against the file's
    size, before any tensor is read. Nothing is unpickled and no code is loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}  # file by tensor
        self._folder = folder
        if (folder / _INDEX).exists():
            self._open_index(folder / _INDEX)
        else:
            self._where = dict.fromkeys(self._open(_SINGLE), _SINGLE)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether the folder has such files."""
        return (folder / _INDEX).exists() or (folder / _SINGLE).exists()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def path(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._folder / self._where[name]

    def read(self, name: str) -> Tensor:
        """Return the tensor, which may be a view of the mapped file."""
        try:
            tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path(name)}: tensor {name!r}: {error}") from error
        return tensor

    def _open(self, file_name: str) -> list[str]:
        path = self._folder / file_name
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._files[file_name] = file
        return list(file.keys())

    def _open_index(self, path: Path) -> None:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: weight_map is missing or no object")
        for file_name in weight_map.values():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(f"{path}: {file_name!r} is no file name in its folder")
        for file_name in dict.fromkeys(weight_map.values()):
            for name in self._open(file_name):
                if weight_map.get(name) == file_name:
                    self._where[name] = file_name
                else:
                    raise CheckpointError(
                        f"{path}: {file_name} holds {name!r}, which the index places in "
                        f"{weight_map.get(name)!r}"
                    )
        missing = [name for name in weight_map if name not in self._where]
        if missing:
            raise CheckpointError(
                f"{self._folder / weight_map[missing[0]]} lacks {missing[0]!r}, "
                f"which {path.name} places there"
            )
