"""Damaged model folders: some by name, others drawn at random."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from tests.server.checkpoints.writers import write_packed

__all__ = [
    "BYTE_CHANGES",
    "VALUES",
    "Files",
    "corrupt_folders",
    "good_files",
    "mutate",
    "peak_bytes",
    "reset_peak",
    "write",
]

Files = dict[str, bytes]
"""A folder's files; b"PIPE" and b"ZEROS" stand for a pipe and a link to /dev/zero."""

CONFIG, GENERATION = "config.json", "generation_config.json"
TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"
PIPE, ZEROS = b"PIPE", b"ZEROS"

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_BAD_SIZES = (0, -1, 1.5, "64", [64], True, 10**9, 10**30)
_NUMBERS = (0, -1, 1, 3, 63, 10**9, 1 << 24, 1 << 31, 1 << 63, 10**30, 10**401, 0.5, 1e-60, 1e300)
VALUES = (None, True, "", "x" * 1000, [], {}, [[]], float("nan"), float("inf"), *_NUMBERS)


def good_files(folder: Path, *, is_sharded: bool = False) -> Files:
    """Return the files of a tiny packed model, written to the folder by transformers."""
    write_packed(
        folder,
        "bitnet",
        linear_class="bitlinear",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        max_position_embeddings=64,
    )
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if not is_sharded:
        return files
    tensors = load(files.pop(TENSORS))
    names = sorted(tensors)
    places = {name: (FIRST, SECOND)[i % 2] for i, name in enumerate(names)}
    for shard in (FIRST, SECOND):
        files[shard] = save({name: tensors[name] for name in names if places[name] == shard})
    return files | {INDEX: json.dumps({"metadata": {}, "weight_map": places}).encode()}


_held: dict[Path, Files] = {}  # by the folders that write() has made


def write(folder: Path, files: Files) -> None:
    """Make the folder hold these files and no others, of which it keeps what it holds already.

    A file that changes is a new one: a mapping of the old one's bytes may still be there.
    """
    folder.mkdir(exist_ok=True)
    held = _held.get(folder, {})
    for name, data in held.items():
        if files.get(name) != data:
            (folder / name).unlink()
    for name, data in files.items():
        if held.get(name) == data:
            continue
        if data == PIPE:
            os.mkfifo(folder / name)
        elif data == ZEROS:
            (folder / name).symlink_to("/dev/zero")
        else:
            (folder / name).write_bytes(data)
    _held[folder] = files


def corrupt_folders(plain: Files, sharded: Files) -> Iterator[tuple[str, Files]]:
    """Yield folders that can't be served, each with what is wrong with it."""
    for files, name in ((plain, CONFIG), (plain, GENERATION), (plain, TENSORS), (sharded, INDEX)):
        for what, data in _bad_contents(files[name]):
            yield f"{name} {what}", files | {name: data}
    yield "no files", {}
    for name in (CONFIG, TENSORS):
        yield f"no {name}", {other: plain[other] for other in plain if other != name}
    for name in (FIRST, SECOND):
        yield f"no {name}", {other: sharded[other] for other in sharded if other != name}
    for what, change in _bad_configs():
        yield f"{CONFIG} with {what}", plain | {CONFIG: _edited(plain[CONFIG], change)}
    for what, change in _bad_tokens("eos_token_id"):
        yield f"{GENERATION} with {what}", plain | {GENERATION: _edited(plain[GENERATION], change)}
    for what, header in _bad_headers(plain[TENSORS]):
        yield f"a header with {what}", plain | {TENSORS: header}
    for what, tensors in _bad_tensors(load(plain[TENSORS])):
        yield f"tensors with {what}", plain | {TENSORS: save(tensors)}
    for what, change in _bad_indexes():
        yield f"an index with {what}", sharded | {INDEX: _edited(sharded[INDEX], change)}


def _bad_contents(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "that is empty", b""
    yield "cut in half", data[: len(data) // 2]
    yield "without its end", data[:-3]
    yield "of zeros", bytes(len(data))
    yield "of ones", b"\xff" * len(data)
    yield "of text", b"<!DOCTYPE html><title>404</title>"
    yield "of brackets", b"[" * 100_000
    yield "that is a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    yield "that is a pipe", PIPE
    yield "that is a link to /dev/zero", ZEROS


def _edited(data: bytes, change: dict[str, Any]) -> bytes:
    return json.dumps(json.loads(data) | change).encode()


def _bad_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in _SIZES:
        for value in _BAD_SIZES:
            yield f"{name} {value!r}", {name: value}
    for value in (0, -1, 1.5, "64", 10**30):
        yield f"max_position_embeddings {value!r}", {"max_position_embeddings": value}
    for value in (0, -1, "1", [], float("nan"), float("inf"), 1e-60, 1e300, 10**401):
        yield f"rms_norm_eps {value!r:.20}", {"rms_norm_eps": value}
        yield f"a theta {value!r:.20}", {"rope_parameters": {"rope_theta": value}}
    for name in ("architectures", "quantization_config", "rope_scaling", "hidden_act"):
        for value in ("x", 3, [3], {"type": "x"}):
            yield f"{name} {value!r}", {name: value}
    yield "attention_bias", {"attention_bias": True}
    yield from _bad_tokens("eos_token_id", "bos_token_id")


def _bad_tokens(*names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        for value in (64, -1, 10**30, 1.5, "2", [[2]], True):
            yield f"{name} {value!r}", {name: value}


def _bad_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    [size] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = "model.norm.weight"
    entry = header[name]
    begin, end = entry["data_offsets"]
    entries: dict[str, Any] = {
        "no entry": None,
        "an entry that is a list": [],
        "an unknown dtype": entry | {"dtype": "Q9"},
        "a negative size": entry | {"shape": [-64]},
        "a size past 2⁶³": entry | {"shape": [1 << 64]},
        "sizes whose product overflows": entry | {"shape": [1 << 32, 1 << 32, 64]},
        "an end before the begin": entry | {"data_offsets": [end, begin]},
        "an end past the file": entry | {"data_offsets": [begin, len(data)]},
        "an overlap": entry | {"data_offsets": [0, end - begin]},
    }
    for what, changed in entries.items():
        encoded = json.dumps(header | {name: changed}).encode()
        yield what, struct.pack("<Q", len(encoded)) + encoded + data[8 + size :]
    for length in (0, 1, size - 1, size + 1, 9 << 20, (1 << 63) - 1, (1 << 64) - 1):
        yield f"a length of {length}", struct.pack("<Q", length) + data[8:]


def _bad_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name, tensor in tensors.items():
        yield f"no {name}", {other: tensors[other] for other in tensors if other != name}
        changed = [("another shape", torch.cat([tensor, tensor])), ("int32", tensor.int())]
        if tensor.is_floating_point():
            changed += [(f"{value}", tensor.clone()) for value in (torch.nan, torch.inf)]
            for value, (_, copy) in zip((torch.nan, torch.inf), changed[2:], strict=True):
                copy.view(-1)[-1] = value
        else:
            changed += [("a code of 3", tensor | 3)]
        for what, copy in changed:
            yield f"{what} in {name}", tensors | {name: copy}
    yield "another", tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(64, 64)}


def _bad_indexes() -> Iterator[tuple[str, dict[str, Any]]]:
    for weight_map in (None, [], "x", {}, {"a": 3}, {"a": "../x"}, {"a": "/etc/passwd"}, {"a": ""}):
        yield f"a map {weight_map!r}", {"weight_map": weight_map}
    yield "a missing file", {"weight_map": {"model.norm.weight": "3.safetensors"}}
    yield "a missing tensor", {"weight_map": {"no.such": FIRST}}
    yield "a null in a name", {"weight_map": {"a": "\0"}}


def mutate(random: Random, files: Files) -> tuple[str, Files]:
    """Return the files with one to three random changes of one of them, and that one's name."""
    name = random.choice([name for name in files if name != "tokenizer.json"])
    data = files[name]
    for _ in range(random.randint(1, 3)):
        data = random.choice(_CHANGES)(random, data)
    return name, files | {name: data}


def _set_bytes(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    limit = len(data) if random.random() < 0.5 else min(len(data), 4096)  # a header is there
    for _ in range(random.randint(1, 8)):
        if limit:
            changed[random.randrange(limit)] = random.randrange(256)
    return bytes(changed)


def _cut(random: Random, data: bytes) -> bytes:
    begin, end = sorted(random.choices(range(len(data) + 1), k=2))
    before, behind = slice(begin), slice(end, None)
    pieces = random.choice([[before], [before, behind], [slice(end), slice(begin, None)]])
    return b"".join(data[piece] for piece in pieces)


def _set_number(random: Random, data: bytes) -> bytes:
    """Return the data with the digits at a random place made another number."""
    head = np.frombuffer(data, np.uint8, min(len(data), 1 << 14))
    digits = np.flatnonzero((head >= ord("0")) & (head <= ord("9")))
    if not len(digits):
        return data
    begin = end = int(random.choice(digits))
    while data[end : end + 1].isdigit():
        end += 1
    return data[:begin] + str(random.choice(_NUMBERS)).encode() + data[end:]


def _set_value(random: Random, data: bytes) -> bytes:
    """Return the data with a value of its JSON, or of its safetensors header, made another."""
    is_json = data[:1] == b"{"
    size = len(data) if is_json else struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    text = data if is_json else data[8 : 8 + size]
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return data
    at: Any = root
    while isinstance(at, dict | list) and at:
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or random.random() < 0.3:
            at[key] = random.choice(VALUES)
            break
        at = at[key]
    encoded = json.dumps(root).encode()
    return encoded if is_json else struct.pack("<Q", len(encoded)) + encoded + data[8 + size :]


BYTE_CHANGES: list[Callable[[Random, bytes], bytes]] = [_set_bytes, _cut, _set_number]
"""Changes of any file."""

_CHANGES = [*BYTE_CHANGES, _set_value]


@cache
def _process_file(name: str, flags: int) -> int:
    """Return a file of this process in /proc, opened once: it's read twice a damaged model."""
    return os.open(f"/proc/self/{name}", flags)


def peak_bytes() -> int:
    """Return the most memory that this process has had since reset_peak."""
    status = os.pread(_process_file("status", os.O_RDONLY), 1 << 14, 0)
    return int(status.split(b"VmHWM:", 1)[1].split(None, 1)[0]) << 10


def reset_peak() -> None:
    os.pwrite(_process_file("clear_refs", os.O_WRONLY), b"5", 0)
