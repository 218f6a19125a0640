"""What Python mirrors of the C++ sources by hand: structures and numbers.

The library tells its own by the same names, in csrc/abi.cpp; they are compared when it is loaded.
"""

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from typing import ClassVar

import torch

from bitwatt_kernels.backend import BLOCK_SIZE, DRAW_SETTINGS, Activation

__all__ = [
    "ACTIVATIONS",
    "CACHE_DTYPES",
    "DENSE_COLUMNS_PER_LINE",
    "DTYPES",
    "REFUSALS",
    "ROW_BLOCK_ROWS",
    "CacheView",
    "DrawSettings",
    "Layer",
    "MatchedRow",
    "MatcherCalls",
    "Matrix",
    "RopeTable",
    "StepCall",
    "differences",
    "mirrored",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_DTYPES = DTYPES | {torch.int8: 3}
ACTIVATIONS: dict[Activation, int] = {"relu2": 0, "silu": 1}

ROW_BLOCK_ROWS = 32
DENSE_COLUMNS_PER_LINE = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 1}

# What a call was refused for, by its Status; 0 is none.
REFUSALS = {
    1: (
        "kBlockOutOfRange",
        "a block table names a block that the cache does not have, or has too few blocks",
    ),
    2: ("kSlotOutOfRange", "a slot lies past the end of the cache"),
    3: ("kPositionOutOfRange", "a position lies past the end of the rope table"),
    4: ("kTokenOutOfRange", "a token id lies past the end of the vocabulary"),
    5: ("kMaskOutOfRange", "a row's mask is none of those given"),
}


class Matrix(ctypes.Structure):
    _fields_: ClassVar = [
        ("blocks", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("N", c_int),
        ("K", c_int),
        ("scale_group", c_int),
        ("scales_dtype", c_int),
    ]


class Layer(ctypes.Structure):
    _fields_: ClassVar = [
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("input_norm", c_void_p),
        ("attention_sub_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_sub_norm", c_void_p),
        ("H", c_int),
        ("G", c_int),
        ("D", c_int),
        ("activation", c_int),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("head_eps", c_float),
    ]


class StepCall(ctypes.Structure):
    _fields_: ClassVar = [
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("T", c_int),
        ("S", c_int),
        ("max_blocks", c_int),
    ]


class CacheView(ctypes.Structure):
    _fields_: ClassVar = [("data", c_void_p), ("num_blocks", c_int64), ("dtype", c_int)]


class RopeTable(ctypes.Structure):
    _fields_: ClassVar = [("rows", c_void_p), ("num_rows", c_int64)]


class DrawSettings(ctypes.Structure):
    _fields_: ClassVar = [(name, c_double) for name in DRAW_SETTINGS]


class MatcherCalls(ctypes.Structure):
    _fields_: ClassVar = [("commit_token", c_void_p), ("compute_mask", c_void_p)]


class MatchedRow(ctypes.Structure):
    _fields_: ClassVar = [
        ("matcher", c_void_p),
        ("mask", c_void_p),
        ("stops", c_void_p),
        ("instead", c_void_p),
        ("num_stops", c_int),
        ("num_instead", c_int),
        ("num_words", c_int),
        ("end", c_int),
        ("min_tokens", c_int64),
        ("num_tokens", c_int64),
        ("is_masked", c_int),
        ("must_end", c_int),
        ("status", c_int),
    ]


def mirrored() -> dict[str, int]:
    """Return sizes, offsets and numbers by the names that csrc/abi.cpp gives them."""
    numbers = {
        "kRelu2": ACTIVATIONS["relu2"],
        "kSilu": ACTIVATIONS["silu"],
        "kInt8": CACHE_DTYPES[torch.int8],
        "kOk": 0,
        "kRowBlockRows": ROW_BLOCK_ROWS,
        "kKvBlockTokens": BLOCK_SIZE,
    }
    numbers |= {"kMatches": 0, "kMatcherFailed": 1, "kNothingAllowed": 2}
    numbers |= {name: status for status, (name, _) in REFUSALS.items()}
    names = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}
    for name, dtype in names.items():
        numbers[name] = DTYPES[dtype]
        numbers[f"dense_columns_per_line.{name}"] = DENSE_COLUMNS_PER_LINE[dtype]
    structures: tuple[type[ctypes.Structure], ...] = (
        *(Matrix, Layer, StepCall, CacheView, RopeTable, DrawSettings),
        *(MatcherCalls, MatchedRow),
    )
    for structure in structures:
        numbers[structure.__name__] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            numbers[f"{structure.__name__}.{field}"] = getattr(structure, field).offset
    return numbers


def differences(told: str) -> list[str]:
    """Return what a library's bw_abi() tells otherwise than mirrored(); empty if they agree."""
    facts = (fact.partition("=") for fact in told.split(","))
    theirs = {name: int(number) for name, _, number in facts}
    ours = mirrored()
    return [
        f"{name} is {theirs.get(name)}, expected {ours.get(name)}"
        for name in sorted(theirs.keys() | ours)
        if theirs.get(name) != ours.get(name)
    ]
