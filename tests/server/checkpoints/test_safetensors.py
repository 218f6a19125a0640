"""Files that are broken, cut short or hostile end in a CheckpointError, never in a crash."""

import json
import os
import socket
import struct
from pathlib import Path

import pytest
import torch
from bitwatt.checkpoints.files import read_json
from bitwatt.checkpoints.safetensors import SafetensorsFolder
from bitwatt.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.uint8)}
GOOD = save(TENSORS)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = SafetensorsFolder(folder)
    return {name: tensors.read(name) for name in tensors}


def file_of(header: object, data: bytes = b"\0" * 29) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_tensors_come_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    for name, tensor in read_all(tmp_path).items():
        assert torch.equal(tensor, TENSORS[name])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    length=st.integers(0, len(GOOD) + 8),
)
def test_any_damaged_file_is_refused_or_read_within_its_bounds(
    tmp_path: Path, edits: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(GOOD)
    for position, value in edits:
        damaged[position] = value
    (tmp_path / "model.safetensors").write_bytes(damaged[:length].ljust(length, b"\0"))
    try:
        tensors = read_all(tmp_path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= length


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 9 << 20).ljust(10 << 20, b" "),
        struct.pack("<Q", 100) + b"{}",
        file_of([]),
        file_of({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 400]}}),
        file_of({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}}),
        file_of({"a": {"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}}),
        file_of({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 24]}}),
        file_of({"a": {"dtype": "Q9", "shape": [2, 3], "data_offsets": [0, 24]}}),
        GOOD[:-1],
    ],
)
def test_an_impossible_header_is_refused_with_the_files_name(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_all(tmp_path)


def write_shards(folder: Path, weight_map: object) -> None:
    save_file({"a": TENSORS["a"]}, folder / "1.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "2.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert set(read_all(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map is missing"),
        ({"a": "../1.safetensors"}, "no file name in its folder"),
        ({"a": "/etc/passwd"}, "no file name in its folder"),
        ({"a": 3}, "no file name in its folder"),
        ({"a": ["1.safetensors"]}, "no file name in its folder"),
        ({"a": "3.safetensors"}, r"3\.safetensors"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "which the index places nowhere"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, r"1\.safetensors lacks 'b'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path)


def test_a_stale_copy_of_a_tensor_is_passed_over_for_the_indexs_place(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    save_file(TENSORS | {"a": torch.zeros(9)}, tmp_path / "2.safetensors")
    tensors = SafetensorsFolder(tmp_path)
    assert torch.equal(tensors.read("a"), TENSORS["a"])
    [notice] = tensors.notices
    assert notice == (
        f"{tmp_path}/2.safetensors: tensor 'a' is passed over: the index places it in 1.safetensors"
    )


def test_a_stale_index_is_passed_over_for_the_file_beside_it(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "gone.safetensors"})
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert set(read_all(tmp_path)) == {"a", "b"}
    assert "index.json is passed over" in SafetensorsFolder(tmp_path).notices[0]


def test_a_git_lfs_pointer_is_called_that(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer"):
        read_all(tmp_path)
    (tmp_path / "config.json").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"config\.json is a Git LFS pointer"):
        read_json(tmp_path / "config.json")


def make_special(path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as unix:
                unix.bind(str(path))


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path, kind: str) -> None:
    make_special(tmp_path / "config.json", kind)
    make_special(tmp_path / "model.safetensors", kind)
    with pytest.raises(CheckpointError, match=r"config\.json is not a regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a regular file"):
        read_all(tmp_path)


def test_a_file_without_permission_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(CheckpointError) as error:
        read_json(tmp_path / "config.json")
    assert str(error.value) == f"{tmp_path}/config.json can't be read: Permission denied"


def test_json_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="1099511627776 bytes; at most 2097152"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_no_object_is_refused_with_the_files_name(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
