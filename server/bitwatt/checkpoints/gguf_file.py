"""The container of a GGUF file: its metadata, and where its tensors lie. No torch, no numpy.

Every count, length, offset and shape is checked against the file before it is used. Arrays stay in
the mapped file until they are asked for, so that opening a file takes little memory, whatever it
says of itself. Versions 2 and 3, little-endian.

Source  github.com/ggml-org/ggml, docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar, overload

from bitwatt.checkpoints.files import cause_of, check_file
from bitwatt.checkpoints.gguf_layouts import LAYOUTS, OTHER_TYPES, Layout
from bitwatt.errors import CheckpointError, shorten

__all__ = ["Gguf", "GgufArray", "GgufTensor", "is_gguf", "open_gguf"]

T = TypeVar("T", int, float, bool, str)

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16
_MAX_KEYS = 1 << 12  # a model has some 50
_MAX_TENSORS = 1 << 16  # LLaMA 405B has 1,138
_MAX_NAME_BYTES = 256  # ggml takes 64
_MAX_STRINGS = 1 << 21  # of all arrays: Gemma has 262,144 tokens and 514,906 merges; 0.4 s
_MAX_DIMENSIONS = 4
_MAX_SPLITS = 1000

_NUMBERS: Final = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")))
_PACKED: Final = {code: struct.Struct(f"<{code}") for code in _NUMBERS.values() if code}
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in its file.

    shape  rows first; the last is what blocks lie along
    start  of its bytes in the file
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    start: int
    num_bytes: int


class GgufArray:
    """An array of the metadata, read from the file as it's gone through.

    kind  str, int, float or bool: what it holds
    """

    def __init__(
        self, file: "_File", where: str, *, type_id: int, count: int, start: int, end: int
    ) -> None:
        self._file, self._where = file, where
        self._type_id, self._count = type_id, count
        self._start, self._end = start, end
        self.kind: type = str if type_id == _STRING else _kind_of(type_id)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        if self._type_id != _STRING:
            numbers = memoryview(self._file.data)[self._start : self._end]
            for (value,) in struct.iter_unpack(f"<{_NUMBERS[self._type_id]}", numbers):
                yield value
            return
        at, data, length = self._start, self._file.data, _PACKED["Q"].unpack_from
        for _ in range(self._count):
            start = at + 8
            at = start + length(data, at)[0]
            try:
                text = data[start:at].decode()
            except UnicodeDecodeError as error:
                raise self._file.not_utf8(self._where, error) from error
            yield text


class Gguf:
    """What a GGUF file holds, or the several files that it was split into.

    metadata  of the first file; see get()
    tensors   of all, by name, in the order of the files
    """

    def __init__(self, path: Path, files: "Sequence[_File]") -> None:
        self.path = path
        self.metadata = files[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        self._files: dict[str, _File] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file.path}: tensor {shorten(name)} is also in {self._files[name].path}"
                    )
                self.tensors[name] = tensor
                self._files[name] = file

    def file_of(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._files[name].path

    def data(self, name: str) -> memoryview:
        """Return the tensor's bytes, a writable view of the file's private mapping."""
        tensor = self.tensors[name]
        return memoryview(self._files[name].data)[tensor.start : tensor.start + tensor.num_bytes]

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Return a number or a text of the metadata, or the default where there is none.

        Raises  CheckpointError if it is of another kind
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            return kind(value)
        if type(value) is not kind:
            raise self.error(key, f"is {_shown(value)}; expected {kind.__name__}")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """Return what get() does; CheckpointError where there is none."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: key {key!r} is missing")
        return value

    def array(self, key: str, kind: type) -> GgufArray | None:
        """Return an array of the metadata, or None; CheckpointError if it is none of that kind."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, GgufArray) or value.kind is not kind:
            raise self.error(key, f"is {_shown(value)}; expected an array of {kind.__name__}")
        return value

    def error(self, key: str, reason: str) -> CheckpointError:
        """Return an error that names the file, a key of its metadata and what's wrong with it."""
        return CheckpointError(f"{self.path}: key {shorten(key)} {reason}")


def is_gguf(path: Path) -> bool:
    """Return whether a path is taken for a GGUF file's."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_gguf(path: Path) -> Gguf:
    """Return what the file holds, together with those that a split file's name stands for.

    Raises  CheckpointError naming the file, the key or tensor, and the cause
    """
    first = _File(path)
    count = first.split("split.count", default=1)
    if count == 1:
        return Gguf(path, [first])
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} files; their names end in -00001-of-{count:05}.gguf"
        )
    names = [f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    if first.split("split.no", default=0) != 0 or path.name != names[0]:
        raise CheckpointError(f"{path}: is not the first of {count} files: give {names[0]}")
    files = [first, *(_File(path.with_name(name)) for name in names[1:])]
    for number, file in enumerate(files):
        told = file.split("split.no", default=0), file.split("split.count", default=1)
        if told != (number, count):
            raise CheckpointError(
                f"{file.path}: says it is file {told[0] + 1} of {told[1]}; "
                f"its name says {number + 1} of {count}"
            )
    return Gguf(path, files)


class _File:
    """One file, mapped: a private mapping, which what is made of it can't write through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._num_strings = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        check_file(path)
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError of an empty file
            raise CheckpointError(f"{path} can't be read: {cause_of(error)}") from error
        self._size = len(self.data)
        num_tensors, num_keys = self._read_counts()
        for _ in range(num_keys):
            self._read_pair()
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not (
            type(alignment) is int
            and 8 <= alignment <= _MAX_ALIGNMENT
            and alignment & (alignment - 1) == 0
        ):
            raise self._error(
                f"general.alignment is {_shown(alignment)}; "
                f"it is a power of two from 8 to {_MAX_ALIGNMENT}"
            )
        found = [self._read_tensor() for _ in range(num_tensors)]
        self._place(found, alignment)

    def split(self, key: str, default: int) -> int:
        """Return a number of how the file was split."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not 0 <= value <= _MAX_SPLITS or value < default:
            raise self._error(
                f"{key} is {_shown(value)}; it is a number from {default} to {_MAX_SPLITS}"
            )
        return value

    def not_utf8(self, where: str, error: UnicodeDecodeError) -> CheckpointError:
        """Return an error that names the file and a text of it that is none."""
        return self._error(f"{where} is not in UTF-8: {error.reason}")

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}")

    def _read_counts(self) -> tuple[int, int]:
        if self.data[:4] != _MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {self.data[:4]!r}")
        self._at = 4
        version = self._number("I", "the header")
        if version not in _VERSIONS:
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            told = "big-endian" if is_swapped else f"of version {version}"
            raise self._error(f"is {told}; versions 2 and 3 are read, little-endian")
        num_tensors, num_keys = self._number("Q", "the header"), self._number("Q", "the header")
        for count, limit, what in (
            (num_tensors, _MAX_TENSORS, "tensors"),
            (num_keys, _MAX_KEYS, "keys"),
        ):
            if count > limit:
                raise self._error(f"says it has {count} {what}; at most {limit} are read")
        return num_tensors, num_keys

    def _number(self, code: str, where: str) -> Any:
        packed = _PACKED[code]
        return packed.unpack_from(self.data, self._take(packed.size, where))[0]

    def _take(self, size: int, where: str) -> int:
        """Return where the next bytes begin, and step over them."""
        start = self._at
        if size > self._size - start:
            raise self._error(f"ends within {where}, which has {size} bytes from {start} on")
        self._at = start + size
        return start

    def _text(self, where: str, limit: int | None = None) -> str:
        length = self._number("Q", where)
        if limit is not None and length > limit:
            raise self._error(f"{where} has {length} bytes; at most {limit} are read")
        start = self._take(length, where)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.not_utf8(where, error) from error

    def _read_pair(self) -> None:
        key = self._text(f"key {len(self.metadata)}", _MAX_NAME_BYTES)
        where = f"key {shorten(key)}"
        if key in self.metadata:
            raise self._error(f"{where} is there twice")
        type_id = self._number("I", where)
        if type_id == _STRING:
            self.metadata[key] = self._text(where)
        elif type_id == _ARRAY:
            self.metadata[key] = self._array(where)
        else:
            code = self._code(type_id, where)
            value = self._number("B" if code == "?" else code, where)
            if code == "?" and value > 1:
                raise self._error(f"{where} is {value}; expected a bool, 0 or 1")
            self.metadata[key] = bool(value) if code == "?" else value

    def _code(self, type_id: int, where: str) -> str:
        code = _NUMBERS.get(type_id)
        if not code:
            raise self._error(f"{where} is of type {type_id}, which GGUF doesn't have")
        return code

    def _array(self, where: str) -> GgufArray:
        type_id, count = self._number("I", where), self._number("Q", where)
        if type_id == _ARRAY:
            raise self._error(f"{where} is an array of arrays, which is not read")
        start = self._at
        if type_id != _STRING:
            self._take(count * _PACKED[self._code(type_id, where)].size, where)
        else:
            self._num_strings += count
            if self._num_strings > _MAX_STRINGS:
                raise self._error(
                    f"{where} brings the texts of all arrays to {self._num_strings}; "
                    f"at most {_MAX_STRINGS} are read"
                )
            self._step_over_texts(count, where)
        return GgufArray(self, where, type_id=type_id, count=count, start=start, end=self._at)

    def _step_over_texts(self, count: int, where: str) -> None:
        at, last, data, unpack = self._at, self._size - 8, self.data, _PACKED["Q"].unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        else:
            if at <= self._size:
                self._at = at
                return
        raise self._error(f"ends within {where}, an array of {count} texts")

    def _read_tensor(self) -> "_Placed":
        name = self._text("a tensor's name", _MAX_NAME_BYTES)
        where = f"tensor {shorten(name)}"
        num_dimensions = self._number("I", where)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"{where} has {num_dimensions} dimensions; 1 to 4 are read")
        shape = tuple(self._number("Q", where) for _ in range(num_dimensions))[::-1]
        type_id, offset = self._number("I", where), self._number("Q", where)
        layouts = LAYOUTS.get(type_id)
        if layouts is None:
            told = OTHER_TYPES.get(type_id, f"of an unknown type, {type_id}")
            raise self._error(f"{where} is {told}, which is not read")
        if 0 in shape:
            raise self._error(f"{where} has shape {list(shape)}, which is empty")
        sizes = {layout: layout.num_bytes(shape) for layout in layouts}
        fits = {layout: size for layout, size in sizes.items() if size is not None}
        if not fits:
            raise self._error(
                f"{where} has shape {list(shape)}; {layouts[0].name} takes rows of a multiple of "
                f"{layouts[0].weights}"
            )
        return _Placed(name, shape, type_id, offset, fits)

    def _place(self, found: "list[_Placed]", alignment: int) -> None:
        """Note where each tensor lies; raise where one leaves the file or meets another.

        A tensor's room ends where the next one begins, or the file. Of a type that has two layouts
        a file means the one by which all fill theirs; of fewer than 2048 weights both can.
        """
        data_start = _aligned(self._at, alignment)
        by_offset = sorted(found, key=lambda placed: placed.offset)
        edges = [*(placed.offset for placed in by_offset), self._size - data_start]
        rooms = [end - start for start, end in pairwise(edges)]
        filling = {placed.type_id: list(LAYOUTS[placed.type_id]) for placed in found}
        for placed, room in zip(by_offset, rooms, strict=True):
            where, layouts = f"tensor {shorten(placed.name)}", filling[placed.type_id]
            if placed.offset % alignment:
                raise self._error(f"{where} is at {placed.offset}, no multiple of {alignment}")
            spare = alignment if len(LAYOUTS[placed.type_id]) > 1 else self._size
            for layout in tuple(layouts):
                size = placed.fits.get(layout)
                if size is None or not (
                    room == _aligned(size, alignment)
                    or (placed is by_offset[-1] and size <= room < size + spare)
                ):
                    layouts.remove(layout)
            if not layouts:
                told = " or ".join(f"{size} as {layout}" for layout, size in placed.fits.items())
                raise self._error(f"{where} has {told} bytes and room for {max(0, room)}")
        for placed in found:
            if placed.name in self.tensors:
                raise self._error(f"tensor {shorten(placed.name)} is there twice")
            layout = filling[placed.type_id][0]
            start = data_start + placed.offset
            self.tensors[placed.name] = GgufTensor(
                placed.name, placed.shape, layout, start, placed.fits[layout]
            )


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor as the header has it.

    fits  the bytes that it takes in each layout of its type
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    fits: dict[Layout, int]


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _kind_of(type_id: int) -> type:
    code = _NUMBERS[type_id]
    return float if code in "fd" else bool if code == "?" else int


def _shown(value: object) -> str:
    if isinstance(value, GgufArray):
        return f"an array of {len(value)} {value.kind.__name__}"
    return shorten(value)
