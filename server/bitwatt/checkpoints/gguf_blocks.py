"""What the blocks of a GGUF tensor decode to, a function a format.

Source  github.com/ggml-org/ggml, src/ggml-quants.c and src/ggml-common.h; for I2_S
        github.com/microsoft/BitNet, src/ggml-bitnet-mad.cpp
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from bitwatt.checkpoints.gguf_file import GgufTensor
from bitwatt.checkpoints.groups import Groups

__all__ = ["STORED_FLOATS", "TERNARY_FORMATS", "decode_floats", "decode_groups"]

# Weights decoded at once, 4 MB of float32: what decoding takes besides its result stays small.
_CHUNK_WEIGHTS = 1 << 20


def decode_groups(tensor: GgufTensor, data: memoryview) -> Iterator[Groups]:
    """Yield a ternary tensor's rows, some at a time.

    Raises  ValueError of the weights' fault: a code of 3, or a scale that is no finite number
    """
    fmt = tensor.layout.name
    if fmt == "I2_S":
        yield from _decode_i2_s(tensor, data)
        return
    for blocks in _chunks(tensor, data):
        codes, scales = _TERNARY[fmt](blocks)
        groups_by_row = tensor.shape[-1] // tensor.layout.weights
        yield Groups.checked(codes.view(-1, tensor.shape[-1]), scales.view(-1, groups_by_row))


def decode_floats(tensor: GgufTensor, data: memoryview) -> Iterator[Tensor]:
    """Yield a tensor's rows, some at a time, in float32 or in the 16-bit float that it's stored in.

    A ternary tensor's too. Raises ValueError as decode_groups() does.
    """
    fmt, columns = tensor.layout.name, tensor.shape[-1]
    if fmt in TERNARY_FORMATS:
        for groups in decode_groups(tensor, data):
            yield groups.dequantized()
    elif fmt in STORED_FLOATS:
        yield torch.frombuffer(data, dtype=STORED_FLOATS[fmt]).view(-1, columns)
    else:
        for blocks in _chunks(tensor, data):
            yield _FLOATS[fmt](blocks).view(-1, columns)


def _chunks(tensor: GgufTensor, data: memoryview) -> Iterator[Tensor]:
    """Yield the blocks of some rows at a time, [blocks, bytes] uint8."""
    blocks_by_row = tensor.shape[-1] // tensor.layout.weights
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, tensor.layout.block_bytes)
    yield from torch.split(blocks, max(1, _CHUNK_WEIGHTS // tensor.shape[-1]) * blocks_by_row)


def _stored_half(blocks: Tensor, at: int) -> Tensor:
    """Return each block's float16 at a byte, [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return each block's float16 at a byte, [blocks, 1] float32."""
    return _stored_half(blocks, at).float()


def _parts(data: Tensor, bits: int, shifts: tuple[int, ...]) -> Tensor:
    """Return bit fields of bytes, [blocks, shifts, bytes]."""
    return torch.stack([data >> shift & (1 << bits) - 1 for shift in shifts], dim=1)


def _q1_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    bits = _parts(blocks[:, 2:], 1, tuple(range(8))).transpose(1, 2).flatten(1)
    return bits.to(torch.int8) * 2 - 1, _stored_half(blocks, 0)


def _q2_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    codes = _parts(blocks[:, 2:], 2, (0, 2, 4, 6)).transpose(1, 2).flatten(1)
    return codes.to(torch.int8) - 1, _stored_half(blocks, 0)


def _tq2_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    codes = [_parts(blocks[:, i : i + 32], 2, (0, 2, 4, 6)).flatten(1) for i in (0, 32)]
    return torch.cat(codes, dim=1).to(torch.int8) - 1, _stored_half(blocks, 64)


def _trits(data: Tensor, count: int) -> Tensor:
    """Return the first digits in base 3 of bytes, [blocks, count · bytes].

    A byte is ceil(256 / 243 of a number of five digits): a multiplication by 3 carries the most
    significant one out of it.
    """
    digits = [((data * 3**i).int() * 3 >> 8) for i in range(count)]  # a byte's product wraps
    return torch.cat(digits, dim=1).to(torch.int8) - 1


def _tq1_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        _trits(blocks[:, :32], 5),
        _trits(blocks[:, 32:48], 5),
        _trits(blocks[:, 48:52], 4),
    ]
    return torch.cat(parts, dim=1), _stored_half(blocks, 52)


def _ptq1_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        _trits(blocks[:, :16], 5),
        _trits(blocks[:, 16:24], 5),
        _trits(blocks[:, 24:26], 4),
    ]
    return torch.cat(parts, dim=1), _stored_half(blocks, 26)


def _decode_i2_s(tensor: GgufTensor, data: memoryview) -> Iterator[Groups]:
    """Yield the rows of an I2_S tensor as x86 processors write it: blocks of 128, one scale.

    The first of four weights has a byte's highest bits. Other processors write other orders under
    the same id, which nothing tells apart; a code of 3, or a scale that is none, tells of another.
    """
    columns = tensor.shape[-1]
    if columns % 128:
        raise ValueError(f"is I2_S with rows of {columns}; multiples of 128 are read")
    scale = torch.frombuffer(data[-tensor.layout.tail_bytes :], dtype=torch.float32, count=1)
    if not 0 < float(scale) < torch.inf:
        raise ValueError(f"has a scale of {float(scale)}: its I2_S is in another layout")
    packed = torch.frombuffer(data[: -tensor.layout.tail_bytes], dtype=torch.uint8).view(-1, 32)
    blocks_by_row = columns // 128
    for blocks in torch.split(packed, max(1, _CHUNK_WEIGHTS // columns) * blocks_by_row):
        codes = _parts(blocks, 2, (6, 4, 2, 0)).view(-1, columns).to(torch.int8) - 1
        yield Groups.checked(codes, scale.expand(codes.shape[0], 1).clone())


def _nibbles(data: Tensor) -> Tensor:
    """Return the low halves of bytes and behind them the high ones, [blocks, 2 · bytes]."""
    return _parts(data, 4, (0, 4)).flatten(1)


def _fifth_bits(data: Tensor) -> Tensor:
    """Return 16 for each bit that is set of four bytes, [blocks, 32]."""
    return _parts(data, 1, tuple(range(8))).transpose(1, 2).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (codes.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes.float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return both of the eight parts of 32 of a K block, [blocks, 8, 1] float32.

    Of six bits each: eight are bytes' low ones, the others a half and two bits left of a byte.
    """
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return (
        (_half(blocks, 0) * scales.float())[:, :, None],
        (_half(blocks, 2) * minima.float())[:, :, None],
    )


def _k_nibbles(data: Tensor) -> Tensor:
    """Return the halves of 128 bytes as eight parts of 32, [blocks, 8, 32]."""
    quarters = data.reshape(-1, 4, 32)
    return torch.stack([quarters & 15, quarters >> 4], dim=2).view(-1, 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    return _k_nibbles(blocks[:, 16:]).float() * scales - minima


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    codes = _k_nibbles(blocks[:, 48:]) | _parts(blocks[:, 16:48], 1, tuple(range(8))) << 4
    return codes.float() * scales - minima


def _q6_k(blocks: Tensor) -> Tensor:
    low = _parts(blocks[:, :128].reshape(-1, 64), 4, (0, 4)).view(-1, 2, 4, 32)
    high = _parts(blocks[:, 128:192].reshape(-1, 32), 2, (0, 2, 4, 6)).view(-1, 2, 4, 32)
    codes = (low | high << 4).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return codes * scales[:, :, None]


_TERNARY: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "PQ2_0": _q2_0,
    "PTQ1_0": _ptq1_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
TERNARY_FORMATS = frozenset({*_TERNARY, "I2_S"})
_FLOATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
STORED_FLOATS: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
