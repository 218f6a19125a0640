"""The container of GGUF files, and what is refused of one before any of it is used."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from bitwatt.checkpoints.gguf_file import GgufArray, open_gguf
from bitwatt.errors import CheckpointError

from tests.server.checkpoints.gguf_writer import (
    Raw,
    Stored,
    gguf_bytes,
    store,
    store_ternary,
    write_gguf,
)

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "an.int": 7,
    "a.float": 0.5,
    "texts": ["a", "", "ß"],
    "numbers": [1, 2, 3],
    "wide": Raw(10, struct.pack("<Q", 1 << 40)),
    "negative": Raw(11, struct.pack("<q", -5)),
}


def weight(shape: tuple[int, ...] = (4, 8)) -> Stored:
    return store(np.arange(np.prod(shape)).reshape(shape))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    return message


def refusal_of(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return refusal(path).removeprefix(f"{path}: ").removeprefix(f"{path} ")


@pytest.mark.parametrize("alignment", [8, 32, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read_as_they_were_written(
    tmp_path: Path, alignment: int, version: int
) -> None:
    tensors = {"a": weight((3, 2, 5)), "b": weight((7,)), "c": weight()}
    metadata = METADATA | {"general.alignment": alignment}
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors, alignment=alignment, version=version))
    gguf = open_gguf(path)
    read = {k: list(v) if isinstance(v, GgufArray) else v for k, v in gguf.metadata.items()}
    assert read == metadata | {"wide": 1 << 40, "negative": -5}
    assert list(gguf.tensors) == ["a", "b", "c"]
    for name, stored in tensors.items():
        assert gguf.tensors[name].shape == stored.shape
        assert gguf.tensors[name].layout.name == "F32"
        assert bytes(gguf.data(name)) == stored.data
        assert gguf.file_of(name) == path


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_add_bos_token(True)
    writer.add_rope_freq_base(1e6)
    values = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    writer.add_tensor("plain", values)
    kind = gguf_package.GGMLQuantizationType.TQ2_0
    writer.add_tensor("ternary", gguf_package.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf = open_gguf(path)
    assert gguf.require("general.architecture", str) == "llama"
    assert gguf.require("llama.context_length", int) == 64
    assert gguf.require("llama.rope.freq_base", float) == 1e6
    assert gguf.get("tokenizer.ggml.add_bos_token", bool) is True
    assert list(gguf.array("tokenizer.ggml.tokens", str) or ()) == ["a", "b"]
    assert bytes(gguf.data("plain")) == values.tobytes()
    assert gguf.tensors["ternary"].layout.name == "TQ2_0"
    assert gguf.tensors["ternary"].shape == (4, 256)


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("an.int", lambda g, k: g.get(k, str)),
        ("an.int", lambda g, k: g.get(k, bool)),
        ("a.bool", lambda g, k: g.get(k, int)),
        ("a.float", lambda g, k: g.get(k, int)),
        ("texts", lambda g, k: g.get(k, str)),
        ("texts", lambda g, k: g.array(k, int)),
        ("numbers", lambda g, k: g.array(k, str)),
        ("an.int", lambda g, k: g.array(k, int)),
        ("missing", lambda g, k: g.require(k, int)),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(
    tmp_path: Path, key: str, read: Callable[[Any, str], Any]
) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA, {"a": weight()})
    gguf = open_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=f"x.gguf: key '{key}' is ") as caught:
        read(gguf, key)
    assert len(str(caught.value)) < 400
    assert gguf.get("an.int", float) == 7.0
    assert gguf.get("missing", int) is None
    assert gguf.array("missing", int) is None


def edited(at: int, code: str, value: int, data: bytes | None = None) -> bytes:
    changed = bytearray(data or gguf_bytes(METADATA, {"a": weight(), "b": weight()}))
    struct.pack_into(f"<{code}", changed, at, value)
    return bytes(changed)


def header(**changes: Any) -> bytes:
    """Return a header of one tensor, with other numbers than the right ones."""
    given = {"shape": (8, 4), "type_id": 0, "offset": 0, "dimensions": None} | changes
    shape = given["shape"]
    name = struct.pack("<Q1s", 1, b"a")
    entry = name + struct.pack("<I", given["dimensions"] or len(shape))
    entry += struct.pack(f"<{len(shape)}Q", *shape)
    entry += struct.pack("<IQ", given["type_id"], given["offset"])
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry
    return data + bytes(-len(data) % 32) + bytes(128)


def array_of(type_id: int, count: int, data: bytes = b"") -> Raw:
    return Raw(9, struct.pack("<IQ", type_id, count) + data)


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "can't be read"),
    "another magic": (b"PK\3\4" + bytes(100), "is no GGUF file: it begins with b'PK"),
    "short": (b"GGUF\3\0\0\0", "ends within the header"),
    "version 1": (edited(4, "I", 1), "is of version 1; versions 2 and 3 are read"),
    "big-endian": (edited(4, ">I"[1:], 3 << 24), "is big-endian"),
    "many tensors": (edited(8, "Q", 1 << 60), "says it has 1152921504606846976 tensors"),
    "many keys": (edited(16, "Q", 5000), "says it has 5000 keys; at most 4096"),
    "more tensors than there are": (edited(8, "Q", 3), "tensor"),
    "a key of 2⁶³ bytes": (edited(24, "Q", 1 << 63), "key 0 has 9223372036854775808 bytes"),
    "a key twice": (
        gguf_bytes({"k": 1}, {}).replace(struct.pack("<QQ", 0, 1), struct.pack("<QQ", 0, 2))[:41]
        + gguf_bytes({"k": 1}, {})[24:41],
        "key 'k' is there twice",
    ),
    "a key not in UTF-8": (
        gguf_bytes({"kk": 1}, {}).replace(b"kk", b"\xff\xfe"),
        "key 0 is not in UTF-8",
    ),
    "a value of type 13": (gguf_bytes({"k": Raw(13, b"")}, {}), "key 'k' is of type 13"),
    "a bool of 2": (gguf_bytes({"k": Raw(7, b"\2")}, {}), "key 'k' is 2; expected a bool"),
    "a text past the end": (
        gguf_bytes({"k": Raw(8, struct.pack("<Q", 1 << 62))}, {}),
        "ends within key 'k'",
    ),
    "an array past the end": (gguf_bytes({"k": array_of(6, 1 << 62)}, {}), "ends within key 'k'"),
    "an array of type 14": (gguf_bytes({"k": array_of(14, 1)}, {}), "key 'k' is of type 14"),
    "an array of arrays": (gguf_bytes({"k": array_of(9, 1)}, {}), "an array of arrays"),
    "an array of many texts": (
        gguf_bytes({"k": array_of(8, 1 << 22)}, {}),
        "texts of all arrays to 4194304; at most 2097152",
    ),
    "texts past the end": (
        gguf_bytes({"k": array_of(8, 9, struct.pack("<Q", 1 << 63))}, {}),
        "ends within key 'k', an array of 9 texts",
    ),
    "fewer texts than told": (
        gguf_bytes({"k": array_of(8, 99, bytes(80))}, {}),
        "ends within key 'k', an array of 99 texts",
    ),
    "an alignment of 0": (
        gguf_bytes({"general.alignment": 0}, {"a": weight()}),
        "general.alignment is 0; it is a power of two from 8",
    ),
    "an alignment of 24": (
        gguf_bytes({"general.alignment": 24}, {"a": weight()}),
        "general.alignment is 24",
    ),
    "an alignment of text": (
        gguf_bytes({"general.alignment": "32"}, {"a": weight()}),
        "general.alignment is '32'",
    ),
    "no dimension": (header(shape=()), "has 0 dimensions"),
    "5 dimensions": (header(shape=(1, 1, 1, 1, 1)), "has 5 dimensions"),
    "an empty shape": (header(shape=(8, 0)), "has shape [0, 8], which is empty"),
    "sizes whose product overflows": (
        header(shape=(1 << 33, 1 << 33, 1 << 33)),
        "and room for 128",
    ),
    "more rows than bytes": (
        header(shape=(8, 5)),
        "tensor 'a' has 160 as F32 bytes and room for 128",
    ),
    "an unaligned offset": (header(offset=4), "tensor 'a' is at 4, no multiple of 32"),
    "an offset past the end": (header(offset=1 << 62), "and room for 0"),
    "an unknown type": (header(type_id=99), "tensor 'a' is of an unknown type, 99"),
    "a type that is not read": (header(type_id=10), "tensor 'a' is Q2_K, which is not read"),
    "rows of no whole blocks": (
        header(type_id=35),
        "tensor 'a' has shape [4, 8]; TQ2_0 takes rows of a multiple of 256",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, what: str) -> None:
    data, reason = CASES[what]
    message = refusal_of(tmp_path, data)
    assert reason in message
    assert len(message) < 300


def test_tensors_that_share_bytes_or_a_name_are_refused(tmp_path: Path) -> None:
    data = gguf_bytes({}, {"a": weight(), "b": weight()})
    overlap = data.replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 96))
    assert "tensor 'a' has 128 as F32 bytes and room for 96" in refusal_of(tmp_path, overlap)
    twice = data.replace(struct.pack("<Q1s", 1, b"b"), struct.pack("<Q1s", 1, b"a"))
    assert "tensor 'a' is there twice" in refusal_of(tmp_path, twice)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes(METADATA, {"a": weight(), "b": weight()})
    for end in range(0, len(data), 7):
        assert refusal_of(tmp_path, data[:end])


def ternary(fmt: str, rows: int, columns: int) -> Stored:
    random = np.random.default_rng(0)
    group = {"Q2_0": 64}.get(fmt, 128)
    scales = random.uniform(0.1, 1, (rows, columns // group))
    return store_ternary(fmt, random.integers(-1, 2, (rows, columns)), scales)


@pytest.mark.parametrize("last", ["floats", "another", "itself, without padding"])
@pytest.mark.parametrize(("fmt", "layout"), [("Q2_0", "Q2_0"), ("Q2_0 of 128", "PQ2_0")])
def test_the_two_layouts_of_type_42_are_told_apart_by_their_room(
    tmp_path: Path, fmt: str, layout: str, last: str
) -> None:
    tensors = {"x": ternary(fmt, 16, 128)}  # 2048 weights
    if last == "floats":
        tensors["y"] = weight()
    elif last == "another":
        tensors["y"] = ternary(fmt, 3, 256)  # which alone could be either
    data = gguf_bytes({}, tensors)
    if last.startswith("itself"):
        data = data[: len(data) + -len(tensors["x"].data) % -32]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    gguf = open_gguf(path)
    assert {t.layout.name for t in gguf.tensors.values()} - {"F32"} == {layout}
    assert bytes(gguf.data("x")) == tensors["x"].data


def test_another_use_of_type_42_is_refused_by_the_room_it_takes(tmp_path: Path) -> None:
    sherry = Stored(42, (16, 256), bytes(16 * 42), np.zeros((16, 256), np.float32))
    message = refusal_of(tmp_path, gguf_bytes({}, {"x": sherry, "y": weight()}))
    assert "tensor 'x' has 1152 as Q2_0 or 1088 as PQ2_0 bytes and room for 672" in message
    wide = Stored(42, (16, 256), bytes(16 * 80), np.zeros((16, 256), np.float32))
    message = refusal_of(tmp_path, gguf_bytes({}, {"x": wide, "y": weight()}))
    assert "tensor 'x' has 1152 as Q2_0 or 1088 as PQ2_0 bytes and room for 1280" in message


def split(number: int, count: int = 3, **more: Any) -> dict[str, Any]:
    kind = {"split.no": Raw(2, struct.pack("<H", number))}
    return kind | {"split.count": Raw(2, struct.pack("<H", count))} | more


def write_split(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m-{i + 1:05}-of-00003.gguf" for i in range(3)]
    write_gguf(paths[0], split(0, **METADATA), {})
    write_gguf(paths[1], split(1), {"a": weight()})
    write_gguf(paths[2], split(2), {"b": weight((5,))})
    return paths


def test_a_split_file_is_read_as_one(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    gguf = open_gguf(paths[0])
    assert gguf.get("an.int", int) == 7
    assert list(gguf.tensors) == ["a", "b"]
    assert [gguf.file_of(name) for name in gguf.tensors] == paths[1:]
    assert bytes(gguf.data("b")) == weight((5,)).data


def test_links_of_a_cache_lead_to_the_files_of_a_split(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for path in write_split(blobs):
        (snapshot / path.name).symlink_to(path.rename(blobs / path.name[:7]))
    assert list(open_gguf(snapshot / "m-00001-of-00003.gguf").tensors) == ["a", "b"]


def test_files_of_a_split_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert "is not the first of 3 files: give m-00001-of-00003.gguf" in refusal(paths[1])
    write_gguf(paths[2], split(1), {"b": weight((5,))})
    assert "says it is file 2 of 3; its name says 3 of 3" in refusal(paths[0])
    write_gguf(paths[2], split(2), {"a": weight((5,))})
    assert f"tensor 'a' is also in {paths[1]}" in refusal(paths[0])
    paths[2].unlink()
    assert "m-00003-of-00003.gguf can't be read" in refusal(paths[0])
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    assert "is one of 3 files; their names end in -00001-of-00003.gguf" in refusal(renamed)
    write_gguf(renamed, split(0, 4000), {})
    assert "split.count is 4000; it is a number from 1 to 1000" in refusal(renamed)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "can't be read" in refusal(tmp_path / "missing.gguf")
    pointer = tmp_path / "pointer.gguf"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in refusal(pointer)
    assert "is not a regular file" in refusal(tmp_path)
