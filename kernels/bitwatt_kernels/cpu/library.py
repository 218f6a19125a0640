"""The compiled kernels: finding the library, and the signatures of its functions."""

import ctypes
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import bitwatt_kernels.cpu
from bitwatt_kernels.cpu.abi import CACHE_DTYPES, DTYPES, REFUSALS, differences
from bitwatt_kernels.errors import BackendError, DtypeError, KernelError

__all__ = ["cache_dtype_of", "check", "dtype_of", "instruction_sets", "load_library"]

LIBRARY_NAME = "bitwatt_cpu.so"

_P, _I, _L, _F = c_void_p, c_int, c_int64, c_float

# As declared in csrc/api.cpp; every function with the default result returns a Status.
_SIGNATURES: dict[str, list[type]] = {
    "bw_repack": [_P, _P, _P, _I, _I],
    "bw_block_rows": [_P, _P, _P, _I, _I, _I, _I],
    "bw_embed": [_P, _P, _P, _P, _I, _I, _I, _I, _I],
    "bw_ternary_rows": [_P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I],
    "bw_linear": [_P, _P, _P, _P, _I, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I],
    "bw_elementwise": [_P, _P, _I, _I, _P, _I, _F, _P, _P, _P, _P, _I, _I, _I],
    "bw_rope_and_cache": [
        *(_P, _P, _I, _P, _L, _P, _I, _L, _P, _P, _P, _P, _P, _F, _I, _I, _I, _I)
    ],
    "bw_attention": [
        *(_P, _P, _I, _P, _I, _L, _P, _P, _P, _I, _P),
        *(_I, _I, _I, _I, _I, _F),
    ],
    "bw_ternary_layers": [_P, _P, _I, _P, _P, _P, _P, _P, _I],
    "bw_dense_linear": [_P, _P, _I, _P, _I, _P, _P, _P, _I, _I, _I, _I],
    "bw_mask": [_P, _P, _P, _P, _I, _I, _I],
    "bw_draw": [_P, _P, _P, _P, _P, _I, _I, _I, _I],
}

# Of csrc/token_masks.cpp, with what each returns.
_MASKS: list[tuple[str, list[type], type | None]] = [
    ("bw_advance", [_P, _P, _P, _I], None),
    ("bw_lane_create", [_P, _P], c_void_p),
    ("bw_lane_start", [_P, _P, _P, _P, _I], None),
    ("bw_lane_wait", [_P, c_double], c_int),
    ("bw_lane_look", [_P, _P], c_int64),
    ("bw_lane_give_up", [_P, _L], c_int),
    ("bw_lane_end", [_P], None),
]


def _candidates() -> list[Path]:
    # An editable install leaves the package in the source tree and the library in site-packages;
    # the package's path names both.
    return [Path(folder) / LIBRARY_NAME for folder in bitwatt_kernels.cpu.__path__]


@cache
def load_library(path: Path | None = None) -> ctypes.CDLL:
    """Return the library at path, or the installed one, with its functions' signatures set.

    Raises  BackendError if there is none, the system's loader refuses it, or it was built from
            other sources than this Python mirrors
    """
    found = path or next((p for p in _candidates() if p.is_file()), None)
    if found is None:
        raise BackendError(
            "the native CPU kernels were not built: install a C++20 compiler "
            "(Debian: apt install g++; Fedora: dnf install gcc-c++) and pip install bitwatt again"
        )
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise BackendError(f"the native CPU kernels do not load: {error}") from error
    _check_abi(library)
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = c_int
    library.bw_instruction_sets.argtypes = []
    library.bw_instruction_sets.restype = c_char_p
    library.bw_create.argtypes = [c_char_p, c_int]
    library.bw_create.restype = c_void_p
    library.bw_destroy.argtypes = [c_void_p]
    library.bw_destroy.restype = None
    for name, argument_types, result in _MASKS:
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, result
    library.bw_advise_huge_pages.argtypes = [c_void_p, c_size_t]
    library.bw_advise_huge_pages.restype = None
    library.bw_read.argtypes = [c_void_p, c_void_p, c_int64]
    library.bw_read.restype = c_uint64
    return library


def _check_abi(library: ctypes.CDLL) -> None:
    told = getattr(library, "bw_abi", None)
    if told is None:
        found = ["it does not tell of its structures"]
    else:
        told.argtypes, told.restype = [], c_char_p
        found = differences(told().decode())
    if found:
        raise BackendError(
            "the native CPU kernels were built from other sources than this Python: "
            f"pip install bitwatt again ({'; '.join(found[:3])})"
        )


def instruction_sets(path: Path | None = None) -> list[str]:
    """Return the instruction sets the library's kernels can use on this machine, fastest first."""
    names: bytes = load_library(path).bw_instruction_sets()
    return names.decode().split(",")


def dtype_of(x: Tensor) -> int:
    """Return the kernels' number of x's dtype; DtypeError if they have none."""
    try:
        return DTYPES[x.dtype]
    except KeyError:
        raise DtypeError(
            f"{x.dtype} is not one the kernels take: bfloat16, float16 or float32"
        ) from None


def cache_dtype_of(kv_cache: Tensor) -> int:
    """Return the kernels' number of a KV cache's dtype; DtypeError if they have none."""
    return CACHE_DTYPES[torch.int8] if kv_cache.dtype == torch.int8 else dtype_of(kv_cache)


def check(status: int) -> None:
    """Raise KernelError if a function of the library has refused its call."""
    if status:
        _, words = REFUSALS[status]
        raise KernelError(words)
