"""An independent writer of GGUF files: the container, and each block format weight by weight."""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOAT_FORMATS",
    "TERNARY_FORMATS",
    "TYPE_IDS",
    "Raw",
    "Stored",
    "draw_floats",
    "encoded",
    "gguf_bytes",
    "store",
    "store_ternary",
    "write_gguf",
]

TYPE_IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "BF16": 30,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "I2_S": 36,
    "Q1_0": 41,
    "Q2_0": 42,
    "Q2_0 of 128": 42,
    "PQ2_0": 142,
    "PTQ1_0": 143,
}


@dataclass(frozen=True)
class Raw:
    """A metadata value of a type by number, as the bytes that it has."""

    type_id: int
    data: bytes


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes, and the values that they stand for."""

    type_id: int
    shape: tuple[int, ...]
    data: bytes
    values: NDArray[np.float32]


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    *,
    alignment: int = 32,
    version: int = 3,
) -> bytes:
    """Return a file: texts, ints (uint32), floats (float32), bools, Raw and lists of these."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        raw = encoded(value)
        head += _text(key) + struct.pack("<I", raw.type_id) + raw.data
    offset = 0
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", tensor.type_id, offset)
        offset += len(tensor.data) + -len(tensor.data) % alignment
    head += bytes(-len(head) % alignment)
    for tensor in tensors.values():
        head += tensor.data + bytes(-len(tensor.data) % alignment)
    return bytes(head)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    path.write_bytes(gguf_bytes(metadata, tensors))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(value: Any) -> Raw:
    """Return a metadata value as gguf_bytes writes it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool):
        return Raw(7, struct.pack("<B", value))
    if isinstance(value, int):
        return Raw(4, struct.pack("<I", value))
    if isinstance(value, float):
        return Raw(6, struct.pack("<f", value))
    if isinstance(value, str):
        return Raw(8, _text(value))
    parts = [encoded(item) for item in value]
    kinds = {part.type_id for part in parts} or {5}
    [kind] = kinds
    data = b"".join(part.data for part in parts)
    return Raw(9, struct.pack("<IQ", kind, len(parts)) + data)


Codes = NDArray[np.int64]
Halves = NDArray[np.float16]
Blocks = NDArray[np.uint8]  # [blocks, bytes of one]


def _empty(count: int, num_bytes: int) -> Blocks:
    return np.zeros((count, num_bytes), np.uint8)


def _put(blocks: Blocks, byte: int, shift: int, codes: NDArray[Any]) -> None:
    """Put a code of each block into its byte."""
    blocks[:, byte] |= codes.astype(np.uint8) << np.uint8(shift)


def _put_halves(blocks: Blocks, at: int, numbers: Halves) -> None:
    blocks[:, at : at + 2] = numbers.astype("<f2")[:, None].view(np.uint8)


# Ternary formats: blocks of codes, and the scale of each.


def _q1_0(codes: Codes, scales: Halves) -> Blocks:
    blocks = _empty(len(codes), 18)
    _put_halves(blocks, 0, scales)
    for j, code in enumerate(codes.T):
        _put(blocks, 2 + j // 8, j % 8, code > 0)
    return blocks


def _q2_0(codes: Codes, scales: Halves) -> Blocks:
    blocks = _empty(len(codes), 2 + codes.shape[1] // 4)
    _put_halves(blocks, 0, scales)
    for j, code in enumerate(codes.T):
        _put(blocks, 2 + j // 4, 2 * (j % 4), code + 1)
    return blocks


def _tq2_0(codes: Codes, scales: Halves) -> Blocks:
    blocks = _empty(len(codes), 66)
    _put_halves(blocks, 64, scales)
    for j, code in enumerate(codes.T):
        _put(blocks, 32 * (j // 128) + j % 32, 2 * (j % 128 // 32), code + 1)
    return blocks


def _base_3(codes: Codes, parts: Sequence[tuple[int, int]], scales: Halves) -> Blocks:
    """Put the codes digit after digit into parts of so many bytes, of so many digits each."""
    numbers = []
    at = 0
    for num_bytes, num_digits in parts:
        for byte in range(num_bytes):
            digits = [codes[:, at + n * num_bytes + byte] + 1 for n in range(num_digits)]
            numbers.append(sum(digit * 3 ** (4 - n) for n, digit in enumerate(digits)))
        at += num_bytes * num_digits
    blocks = _empty(len(codes), len(numbers) + 2)
    for byte, number in enumerate(numbers):
        _put(blocks, byte, 0, -(-number * 256 // 243))
    _put_halves(blocks, len(numbers), scales)
    return blocks


def _tq1_0(codes: Codes, scales: Halves) -> Blocks:
    return _base_3(codes, [(32, 5), (16, 5), (4, 4)], scales)


def _ptq1_0(codes: Codes, scales: Halves) -> Blocks:
    return _base_3(codes, [(16, 5), (8, 5), (2, 4)], scales)


TERNARY_FORMATS: dict[str, tuple[int, Callable[[Codes, Halves], Blocks]]] = {
    "Q1_0": (128, _q1_0),
    "Q2_0": (64, _q2_0),
    "Q2_0 of 128": (128, _q2_0),
    "PQ2_0": (128, _q2_0),
    "TQ1_0": (256, _tq1_0),
    "TQ2_0": (256, _tq2_0),
    "PTQ1_0": (128, _ptq1_0),
}
"""Weights a block, and what writes blocks."""


def store_ternary(fmt: str, codes: Codes, scales: NDArray[Any]) -> Stored:
    """Return a ternary matrix in the format.

    codes   [rows, columns] in {-1, 0, 1}
    scales  [rows, groups], or [1, 1] for I2_S
    """
    if fmt == "I2_S":
        scale = np.float32(scales[0, 0])
        blocks = _empty(codes.size // 128, 32)
        for j, code in enumerate(codes.reshape(-1, 128).T):
            _put(blocks, j % 32, 6 - 2 * (j // 32), code + 1)
        tail = struct.pack("<f", scale) + bytes(28)
        return Stored(36, codes.shape, blocks.tobytes() + tail, _scaled(codes, scale))
    group, write = TERNARY_FORMATS[fmt]
    halves = scales.astype(np.float16)
    data = write(codes.reshape(-1, group), halves.reshape(-1)).tobytes()
    values = _scaled(codes, np.repeat(halves.astype(np.float32), group, axis=1))
    return Stored(TYPE_IDS[fmt], codes.shape, data, values)


def _scaled(codes: Codes, scales: Any) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # an infinite scale's zeros
        return (codes * scales).astype(np.float32)


# Formats of floats: blocks of drawn codes, and the values that they stand for.

Drawn = tuple[Blocks, NDArray[np.float32]]


def _halves(random: np.random.Generator, count: int) -> Halves:
    return random.uniform(-0.1, 0.1, count).astype(np.float16)


def _column(numbers: NDArray[Any]) -> NDArray[np.float32]:
    return numbers.astype(np.float32)[:, None]


def _nibble_blocks(
    random: np.random.Generator, count: int, *, has_minimum: bool, has_fifth_bit: bool
) -> Drawn:
    scales, minima = _halves(random, count), _halves(random, count)
    codes = random.integers(0, 32 if has_fifth_bit else 16, (count, 32))
    head = 4 if has_minimum else 2
    blocks = _empty(count, head + 4 * has_fifth_bit + 16)
    _put_halves(blocks, 0, scales)
    if has_minimum:
        _put_halves(blocks, 2, minima)
    for j, code in enumerate(codes.T):
        if has_fifth_bit:
            _put(blocks, head + j // 8, j % 8, code >> 4)
        _put(blocks, head + 4 * has_fifth_bit + j % 16, 4 * (j // 16), code & 15)
    if has_minimum:
        return blocks, codes.astype(np.float32) * _column(scales) + _column(minima)
    middle = 16 if has_fifth_bit else 8
    return blocks, (codes - middle).astype(np.float32) * _column(scales)


def _q8_0(random: np.random.Generator, count: int) -> Drawn:
    scales = _halves(random, count)
    codes = random.integers(-128, 128, (count, 32)).astype(np.int8)
    blocks = _empty(count, 34)
    _put_halves(blocks, 0, scales)
    blocks[:, 2:] = codes.view(np.uint8)
    return blocks, codes.astype(np.float32) * _column(scales)


def _k_blocks(random: np.random.Generator, count: int, *, has_fifth_bit: bool) -> Drawn:
    scale, minimum = _halves(random, count), _halves(random, count)
    codes = random.integers(0, 32 if has_fifth_bit else 16, (count, 256))
    scales, minima = random.integers(0, 64, (2, 8, count))
    nibbles = 48 if has_fifth_bit else 16
    blocks = _empty(count, nibbles + 128)
    _put_halves(blocks, 0, scale)
    _put_halves(blocks, 2, minimum)
    for part in range(8):
        if part < 4:
            _put(blocks, 4 + part, 0, scales[part])
            _put(blocks, 8 + part, 0, minima[part])
        else:
            _put(blocks, 8 + part, 0, scales[part] & 15)
            _put(blocks, 8 + part, 4, minima[part] & 15)
            _put(blocks, part, 6, scales[part] >> 4)
            _put(blocks, 4 + part, 6, minima[part] >> 4)
    for j, code in enumerate(codes.T):
        _put(blocks, nibbles + 32 * (j // 64) + j % 32, 4 * (j // 32 % 2), code & 15)
        if has_fifth_bit:
            _put(blocks, 16 + j % 32, j // 32, code >> 4)
    by_part = codes.reshape(count, 8, 32).astype(np.float32)
    step = _column(scale) * scales.T.astype(np.float32)
    least = _column(minimum) * minima.T.astype(np.float32)
    return blocks, (by_part * step[..., None] - least[..., None]).reshape(count, 256)


def _q6_k(random: np.random.Generator, count: int) -> Drawn:
    scale = _halves(random, count)
    codes = random.integers(0, 64, (count, 256))
    scales = random.integers(-128, 128, (count, 16)).astype(np.int8)
    blocks = _empty(count, 210)
    blocks[:, 192:208] = scales.view(np.uint8)
    _put_halves(blocks, 208, scale)
    for j, code in enumerate(codes.T):
        half, quarter, at = j // 128, j % 128 // 32, j % 32
        _put(blocks, 64 * half + 32 * (quarter % 2) + at, 4 * (quarter // 2), code & 15)
        _put(blocks, 128 + 32 * half + at, 2 * quarter, code >> 4)
    step = _column(scale) * scales.astype(np.float32)
    by_part = (codes - 32).astype(np.float32).reshape(count, 16, 16)
    return blocks, (by_part * step[..., None]).reshape(count, 256)


FLOAT_FORMATS: dict[str, tuple[int, Callable[[np.random.Generator, int], Drawn]]] = {
    "Q4_0": (32, partial(_nibble_blocks, has_minimum=False, has_fifth_bit=False)),
    "Q4_1": (32, partial(_nibble_blocks, has_minimum=True, has_fifth_bit=False)),
    "Q5_0": (32, partial(_nibble_blocks, has_minimum=False, has_fifth_bit=True)),
    "Q5_1": (32, partial(_nibble_blocks, has_minimum=True, has_fifth_bit=True)),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, partial(_k_blocks, has_fifth_bit=False)),
    "Q5_K": (256, partial(_k_blocks, has_fifth_bit=True)),
    "Q6_K": (256, _q6_k),
}
"""Weights a block, and what draws so many blocks."""


def draw_floats(fmt: str, random: np.random.Generator, shape: tuple[int, ...]) -> Stored:
    """Return a tensor of this shape in a format of floats, its blocks drawn at random."""
    weights, draw = FLOAT_FORMATS[fmt]
    blocks, values = draw(random, math.prod(shape) // weights)
    return Stored(TYPE_IDS[fmt], shape, blocks.tobytes(), values.reshape(shape))


def store(values: NDArray[Any], fmt: str = "F32") -> Stored:
    """Return a tensor stored as floats."""
    exact = values.astype(np.float32)
    if fmt == "BF16":
        bits = exact.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        stored = (rounded.astype(np.uint32) << 16).view(np.float32)
        return Stored(30, values.shape, rounded.tobytes(), stored)
    kept = exact.astype(np.float16 if fmt == "F16" else np.float32)
    return Stored(TYPE_IDS[fmt], values.shape, kept.tobytes(), kept.astype(np.float32))
