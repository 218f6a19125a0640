"""An independent writer of GGUF files: the container, and each block format weight by weight."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
        type_id, data = _value(value)
        head += _text(key) + struct.pack("<I", type_id) + data
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


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, Raw):
        return value.type_id, value.data
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    parts = [_value(item) for item in value]
    kinds = {kind for kind, _ in parts} or {5}
    [kind] = kinds
    return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)


Codes = NDArray[np.int64]
Block = bytearray


def _put(block: Block, byte: int, shift: int, code: int) -> None:
    block[byte] |= int(code) << shift


def _put_half(block: Block, at: int, number: np.float16) -> None:
    block[at : at + 2] = struct.pack("<e", number)


# Ternary formats: a block of codes and its scale.


def _q1_0(codes: Codes, scale: np.float16) -> Block:
    block = Block(18)
    _put_half(block, 0, scale)
    for j, code in enumerate(codes):
        _put(block, 2 + j // 8, j % 8, code > 0)
    return block


def _q2_0(codes: Codes, scale: np.float16) -> Block:
    block = Block(2 + len(codes) // 4)
    _put_half(block, 0, scale)
    for j, code in enumerate(codes):
        _put(block, 2 + j // 4, 2 * (j % 4), code + 1)
    return block


def _tq2_0(codes: Codes, scale: np.float16) -> Block:
    block = Block(66)
    _put_half(block, 64, scale)
    for j, code in enumerate(codes):
        _put(block, 32 * (j // 128) + j % 32, 2 * (j % 128 // 32), code + 1)
    return block


def _base_3(codes: Codes, parts: Sequence[tuple[int, int]], scale: np.float16) -> Block:
    """Put the codes digit after digit into parts of so many bytes, of so many digits each."""
    digits: list[list[int]] = []
    at = 0
    for num_bytes, num_digits in parts:
        chunk = codes[at : at + num_bytes * num_digits].reshape(num_digits, num_bytes)
        digits += [list(column) + [-1] * (5 - num_digits) for column in chunk.T.tolist()]
        at += num_bytes * num_digits
    numbers = [sum((digit + 1) * 3 ** (4 - n) for n, digit in enumerate(row)) for row in digits]
    block = Block(-(-number * 256 // 243) for number in numbers) + Block(2)
    _put_half(block, len(block) - 2, scale)
    return block


def _tq1_0(codes: Codes, scale: np.float16) -> Block:
    return _base_3(codes, [(32, 5), (16, 5), (4, 4)], scale)


def _ptq1_0(codes: Codes, scale: np.float16) -> Block:
    return _base_3(codes, [(16, 5), (8, 5), (2, 4)], scale)


TERNARY_FORMATS: dict[str, tuple[int, Callable[[Codes, np.float16], Block]]] = {
    "Q1_0": (128, _q1_0),
    "Q2_0": (64, _q2_0),
    "Q2_0 of 128": (128, _q2_0),
    "PQ2_0": (128, _q2_0),
    "TQ1_0": (256, _tq1_0),
    "TQ2_0": (256, _tq2_0),
    "PTQ1_0": (128, _ptq1_0),
}
"""Weights a block, and what writes one."""


def store_ternary(fmt: str, codes: Codes, scales: NDArray[Any]) -> Stored:
    """Return a ternary matrix in the format.

    codes   [rows, columns] in {-1, 0, 1}
    scales  [rows, groups], or [1, 1] for I2_S
    """
    rows, columns = codes.shape
    if fmt == "I2_S":
        scale = np.float32(scales[0, 0])
        block = Block(rows * columns // 4 + 32)
        for j, code in enumerate(codes.reshape(-1)):
            _put(block, 32 * (j // 128) + j % 32, 6 - 2 * (j % 128 // 32), code + 1)
        block[-32:-28] = struct.pack("<f", scale)
        return Stored(36, codes.shape, bytes(block), _scaled(codes, scale))
    group, write = TERNARY_FORMATS[fmt]
    halves = scales.astype(np.float16)
    data = b"".join(
        bytes(write(codes[n, g * group : (g + 1) * group], halves[n, g]))
        for n in range(rows)
        for g in range(columns // group)
    )
    values = _scaled(codes, np.repeat(halves.astype(np.float32), group, axis=1))
    return Stored(TYPE_IDS[fmt], codes.shape, data, values)


def _scaled(codes: Codes, scales: Any) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # an infinite scale's zeros
        return (codes * scales).astype(np.float32)


# Formats of floats: a block of drawn codes, and the values that they stand for.

Drawn = tuple[Block, NDArray[np.float32]]


def _halves(random: np.random.Generator, count: int) -> list[np.float16]:
    return list(random.uniform(-0.1, 0.1, count).astype(np.float16))


def _nibble_block(random: np.random.Generator, *, has_minimum: bool, has_fifth_bit: bool) -> Drawn:
    scale, minimum = _halves(random, 2)
    codes = random.integers(0, 32 if has_fifth_bit else 16, 32)
    head = 4 if has_minimum else 2
    block = Block(head + 4 * has_fifth_bit + 16)
    _put_half(block, 0, scale)
    if has_minimum:
        _put_half(block, 2, minimum)
    for j, code in enumerate(codes):
        if has_fifth_bit:
            _put(block, head + j // 8, j % 8, code >> 4)
        _put(block, head + 4 * has_fifth_bit + j % 16, 4 * (j // 16), code & 15)
    if has_minimum:
        return block, codes.astype(np.float32) * np.float32(scale) + np.float32(minimum)
    middle = 16 if has_fifth_bit else 8
    return block, (codes - middle).astype(np.float32) * np.float32(scale)


def _q8_0(random: np.random.Generator) -> Drawn:
    [scale] = _halves(random, 1)
    codes = random.integers(-128, 128, 32).astype(np.int8)
    block = Block(struct.pack("<e", scale) + codes.tobytes())
    return block, codes.astype(np.float32) * np.float32(scale)


def _k_block(random: np.random.Generator, *, has_fifth_bit: bool) -> Drawn:
    scale, minimum = _halves(random, 2)
    codes = random.integers(0, 32 if has_fifth_bit else 16, 256)
    scales, minima = random.integers(0, 64, (2, 8))
    nibbles = 48 if has_fifth_bit else 16
    block = Block(nibbles + 128)
    _put_half(block, 0, scale)
    _put_half(block, 2, minimum)
    for part in range(8):
        if part < 4:
            _put(block, 4 + part, 0, scales[part])
            _put(block, 8 + part, 0, minima[part])
        else:
            _put(block, 8 + part, 0, scales[part] & 15)
            _put(block, 8 + part, 4, minima[part] & 15)
            _put(block, part, 6, scales[part] >> 4)
            _put(block, 4 + part, 6, minima[part] >> 4)
    for j, code in enumerate(codes):
        _put(block, nibbles + 32 * (j // 64) + j % 32, 4 * (j // 32 % 2), code & 15)
        if has_fifth_bit:
            _put(block, 16 + j % 32, j // 32, code >> 4)
    by_part = codes.reshape(8, 32).astype(np.float32)
    step = (np.float32(scale) * scales.astype(np.float32))[:, None]
    least = (np.float32(minimum) * minima.astype(np.float32))[:, None]
    return block, (by_part * step - least).reshape(-1)


def _q6_k(random: np.random.Generator) -> Drawn:
    [scale] = _halves(random, 1)
    codes = random.integers(0, 64, 256)
    scales = random.integers(-128, 128, 16).astype(np.int8)
    block = Block(192) + Block(scales.tobytes() + struct.pack("<e", scale))
    for j, code in enumerate(codes):
        half, quarter, at = j // 128, j % 128 // 32, j % 32
        _put(block, 64 * half + 32 * (quarter % 2) + at, 4 * (quarter // 2), code & 15)
        _put(block, 128 + 32 * half + at, 2 * quarter, code >> 4)
    step = (np.float32(scale) * scales.astype(np.float32))[:, None]
    return block, ((codes - 32).astype(np.float32).reshape(16, 16) * step).reshape(-1)


FLOAT_FORMATS: dict[str, tuple[int, Callable[[np.random.Generator], Drawn]]] = {
    "Q4_0": (32, lambda r: _nibble_block(r, has_minimum=False, has_fifth_bit=False)),
    "Q4_1": (32, lambda r: _nibble_block(r, has_minimum=True, has_fifth_bit=False)),
    "Q5_0": (32, lambda r: _nibble_block(r, has_minimum=False, has_fifth_bit=True)),
    "Q5_1": (32, lambda r: _nibble_block(r, has_minimum=True, has_fifth_bit=True)),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, lambda r: _k_block(r, has_fifth_bit=False)),
    "Q5_K": (256, lambda r: _k_block(r, has_fifth_bit=True)),
    "Q6_K": (256, _q6_k),
}
"""Weights a block, and what draws one."""


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
