"""Writes the container of a GGUF file: metadata, and tensors one after the other. No torch.

Source  github.com/ggml-org/ggml, docs/gguf.md
"""

import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from bitwatt.errors import CheckpointError, shorten

__all__ = ["GgufWriter", "MetadataValue", "encoded"]

MetadataValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
"""Whole numbers are uint32, negative ones and those in arrays int32; others are float32."""

_VERSION = 3
_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class GgufWriter:
    """A file of tensors that are added one by one, with no more than one in memory; a context."""

    def __init__(self, folder: Path) -> None:
        """Begin; the tensors wait in a file of the folder without a name."""
        self._infos = bytearray()
        self._count = 0
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed below

    def add(self, name: str, shape: Sequence[int], type_id: int, data: memoryview | bytes) -> None:
        """Add a tensor, its rows first in shape and its bytes as its type has them."""
        self._infos += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        self._infos += struct.pack("<IQ", type_id, self._data.tell())
        self._data.write(data)
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        self._count += 1

    def finish(self, path: Path, metadata: Mapping[str, MetadataValue]) -> int:
        """Write the file; return the bytes of its tensors.

        Raises  CheckpointError for metadata that its types don't hold
        """
        head = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, self._count, len(metadata)))
        for key, value in metadata.items():
            try:
                head += _text(key) + encoded(value)
            except (struct.error, UnicodeEncodeError, OverflowError) as error:
                raise CheckpointError(
                    f"no GGUF file holds {shorten(key)} of {shorten(value)}: {error}"
                ) from error
        head += self._infos
        head += bytes(-len(head) % _ALIGNMENT)
        num_bytes = self._data.tell()
        self._data.seek(0)
        with path.open("wb") as file:
            file.write(head)
            shutil.copyfileobj(self._data, file, 1 << 20)
        return num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()


def encoded(value: MetadataValue) -> bytes:
    """Return a value of the metadata, its type before it."""
    match value:
        case bool():
            return struct.pack("<IB", _BOOL, value)
        case int():
            kind, code = (_INT32, "i") if value < 0 else (_UINT32, "I")
            return struct.pack(f"<I{code}", kind, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
    kinds = {type(item) for item in value}
    if kinds <= {str}:
        texts = b"".join(_text(str(item)) for item in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + texts
    kind, code = (_INT32, "i") if kinds == {int} else (_FLOAT32, "f")
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
