"""Tensors of a folder's safetensors files, memory-mapped and checked."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwatt.checkpoints.files import cause_of, check_file, is_there, read_json
from bitwatt.errors import CheckpointError, shorten

__all__ = ["SafetensorsFolder"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 8 << 20  # the library parses up to 100 MB; 1,800 tensors take 0.3


class SafetensorsFolder:
    """The tensors of model.safetensors, or else of the files that the folder's index names.

    Opening maps the files; the library checks each header, and its offsets against the file's
    size, before any tensor is read. Nothing is unpickled and no code is loaded.

    notices  files and tensors that were passed over
    """

    def __init__(self, folder: Path) -> None:
        self.notices: list[str] = []
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}  # file by tensor
        self._folder = folder
        if is_there(folder / _SINGLE):  # transformers takes it too, whatever the index says
            self._where = dict.fromkeys(self._open(_SINGLE), _SINGLE)
            if is_there(folder / _INDEX):
                self.notices.append(f"{folder / _INDEX} is passed over for {_SINGLE} beside it")
        else:
            self._open_index(folder / _INDEX)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether the folder has such files."""
        return is_there(folder / _INDEX) or is_there(folder / _SINGLE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def path(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._folder / self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape, from its file's header."""
        file = self._file(name)
        try:
            return tuple(file.get_slice(name).get_shape())
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path(name)}: tensor {shorten(name)}: {cause_of(error)}"
            ) from error

    def read(self, name: str) -> Tensor:
        """Return the tensor, which may be a view of the mapped file."""
        file = self._file(name)
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path(name)}: tensor {shorten(name)}: {cause_of(error)}"
            ) from error
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._where:
            raise CheckpointError(f"{self._folder} has no tensor {shorten(name)}")
        return self._files[self._where[name]]

    def _open(self, file_name: str) -> list[str]:
        path = self._folder / file_name
        head = check_file(path)[:8].ljust(8, b"\0")
        [header_bytes] = struct.unpack("<Q", head)
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is no safetensors file: its header would have {header_bytes} bytes; "
                f"at most {_MAX_HEADER_BYTES} are read"
            )
        try:
            file: Any = safe_open(path, framework="pt")
            names = list(file.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {cause_of(error)}") from error
        self._files[file_name] = file
        return names

    def _open_index(self, path: Path) -> None:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: weight_map is missing or no object")
        for file_name in weight_map.values():
            is_name = isinstance(file_name, str) and Path(file_name).name == file_name
            if not (is_name and file_name.isprintable() and len(file_name) < 256):
                raise CheckpointError(f"{path}: {shorten(file_name)} is no file name in its folder")
        for file_name in dict.fromkeys(weight_map.values()):
            for name in self._open(file_name):
                place = weight_map.get(name)
                if place == file_name:
                    self._where[name] = file_name
                elif place is None:
                    raise CheckpointError(
                        f"{path}: {file_name} holds {shorten(name)}, which the index places nowhere"
                    )
                else:
                    self.notices.append(
                        f"{self._folder / file_name}: tensor {shorten(name)} is passed over: "
                        f"the index places it in {place}"
                    )
        missing = [name for name in weight_map if name not in self._where]
        if missing:
            raise CheckpointError(
                f"{self._folder / weight_map[missing[0]]} lacks {shorten(missing[0])}, "
                f"which {path.name} places there"
            )
