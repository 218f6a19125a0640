"""Grammars by llguidance's C interface, whose masks are computed without the interpreter.

A thread of Python's takes turns with the engine's and the step's for the interpreter's lock (GIL),
at every mask. The library's wheel has its C interface, too (llguidance.h: opaque handles, and
structures that begin with what is set here); the kernels' library calls it from a thread of its
own. Where one of the two is missing, or other than this mirrors, matching.py's way serves.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from bitwatt_kernels.cpu.library import load_library
from bitwatt_kernels.cpu.token_masks import MatchedRow, MatcherCalls, advance
from bitwatt_kernels.errors import BackendError

from bitwatt.constraints.compiling import (
    LIMITS,
    TokenBytes,
    as_matchers_know,
)
from bitwatt.constraints.matching import NOTHING_ALLOWED, Grammar, cannot_go_on, one_line

__all__ = ["NativeGrammar", "NativeMatcher", "NativeTokenizer", "native_calls", "native_tokenizer"]

_NOTHING_ALLOWED = 2  # of MatchStatus

# What llg_constraint_init_set_defaults is known to write: another layout reads otherwise.
_DEFAULTS = (2000, 1_000_000, 200_000, 50_000, 250_000, 500_000, True, True)


class _Limits(ctypes.Structure):
    _fields_: ClassVar = [
        ("max_items_in_row", c_size_t),
        ("initial_lexer_fuel", c_uint64),
        ("step_lexer_fuel", c_uint64),
        ("step_max_items", c_size_t),
        ("max_lexer_states", c_size_t),
        ("max_grammar_size", c_size_t),
        ("precompute_large_lexemes", c_bool),
        ("verbose_errors", c_bool),
    ]


class _ConstraintInit(ctypes.Structure):
    _fields_: ClassVar = [
        ("tokenizer", c_void_p),
        ("log_buffer_level", c_uint32),
        ("log_stderr_level", c_uint32),
        ("ff_tokens_ok", c_bool),
        ("backtrack_ok", c_bool),
        ("limits", _Limits),
        ("room", c_uint64 * 16),  # for what a later version may write behind
    ]


class _TokenizerInit(ctypes.Structure):
    _fields_: ClassVar = [
        ("vocab_size", c_uint32),
        ("tok_eos", c_uint32),
        ("token_lens", c_void_p),
        ("token_bytes", c_void_p),
        ("tokenizer_json", c_char_p),
        ("tokenize_assumes_string", c_bool),
        ("tokenize_fn", c_void_p),
        ("use_approximate_greedy_tokenize_fn", c_bool),
        ("tokenize_user_data", c_void_p),
        ("slices", c_void_p),
    ]


_P = c_void_p
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "llg_new_tokenizer": ([_P, c_char_p, c_size_t], c_void_p),
    "llg_free_tokenizer": ([_P], None),
    "llg_constraint_init_set_defaults": ([_P, _P], None),
    "llg_new_constraint_any": ([_P, c_char_p, c_char_p], c_void_p),
    "llg_clone_constraint": ([_P], c_void_p),
    "llg_free_constraint": ([_P], None),
    "llg_get_error": ([_P], c_char_p),
    "llg_get_version": ([], c_char_p),
    "llg_commit_token": ([_P, c_uint32, _P], ctypes.c_int),
    "llg_compute_mask": ([_P, _P], ctypes.c_int),
}


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library with its functions' signatures set; None where it is not as known."""
    found = importlib.util.find_spec("llguidance._lib")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(found.origin)))
        for name, (argument_types, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argument_types, result
    except (OSError, AttributeError):
        return None
    if not library.llg_get_version().startswith(b"llguidance@1."):
        return None
    init = _ConstraintInit()
    library.llg_constraint_init_set_defaults(ctypes.byref(init), None)
    limits = tuple(getattr(init.limits, name) for name, *_ in _Limits._fields_)
    levels = (init.log_buffer_level, init.log_stderr_level)
    is_known = limits == _DEFAULTS and levels == (0, 1) and not init.ff_tokens_ok
    return library if is_known else None


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "native_tokenizer has looked"
    return library


@cache
def native_calls() -> MatcherCalls | None:
    """Return what advances native matchers; None where there can be none."""
    library = _library()
    if library is None:
        return None
    try:
        load_library()
    except BackendError:
        return None
    commit, compute = (
        ctypes.cast(function, c_void_p)
        for function in (library.llg_commit_token, library.llg_compute_mask)
    )
    return MatcherCalls(commit, compute)


class _Handle:
    """Something of the library's, freed with its last reference."""

    def __init__(self, address: int, free: Callable[[int], None]) -> None:
        self.address = address
        self._free = free

    def __del__(self) -> None:
        self._free(self.address)


def native_tokenizer(token_bytes: TokenBytes, vocab_size: int) -> "NativeTokenizer | None":
    """Return the tokens as native matchers know them; None where this machine can have none."""
    calls = native_calls()
    return None if calls is None else NativeTokenizer(calls, token_bytes, vocab_size)


class NativeTokenizer:
    """The tokens as matchers know them, as compiling.new_tokenizer has them."""

    def __init__(self, calls: MatcherCalls, token_bytes: TokenBytes, vocab_size: int) -> None:
        """Raises ValueError where the library refuses them."""
        library = _loaded()
        tokens, special = as_matchers_know(token_bytes, vocab_size)
        for token_id in special:
            tokens[token_id] = b"\xff" + tokens[token_id]  # the library's mark of one
        lengths = (c_uint32 * len(tokens))(*map(len, tokens))
        joined = b"".join(tokens)
        init = _TokenizerInit(
            vocab_size=len(tokens),
            tok_eos=vocab_size,
            token_lens=ctypes.addressof(lengths),
            token_bytes=ctypes.cast(c_char_p(joined), c_void_p),
            use_approximate_greedy_tokenize_fn=True,  # nothing is forced, so none is called
        )
        error = ctypes.create_string_buffer(1000)
        address = library.llg_new_tokenizer(ctypes.byref(init), error, len(error))
        if not address:
            raise ValueError(error.value.decode(errors="replace"))
        self._handle = _Handle(address, library.llg_free_tokenizer)
        self._vocab_size = vocab_size
        self._calls = calls

    def compile(self, text: str, end_token_ids: Sequence[int]) -> "NativeGrammar":
        """Return the grammar that compiling.written_for_matcher gives; other threads run meanwhile.

        Raises  ValueError of one line
        """
        assert "\0" not in text, "C would read no further"
        library = _loaded()
        init = _ConstraintInit()
        library.llg_constraint_init_set_defaults(ctypes.byref(init), self._handle.address)
        init.log_stderr_level = 0
        for name, value in LIMITS.items():
            setattr(init.limits, name, value)
        kind = b"llguidance" if text.startswith("{") else b"lark"
        address = library.llg_new_constraint_any(ctypes.byref(init), kind, text.encode())
        start = _Handle(address, library.llg_free_constraint)
        if error := library.llg_get_error(address):
            raise ValueError(one_line(error.decode(errors="replace")))
        return NativeGrammar(start, self._calls, self._vocab_size, end_token_ids)


class NativeGrammar(Grammar):
    """A grammar whose matchers are NativeMatchers; NativeTokenizer.compile makes one.

    instead  Grammar's end_token_ids
    """

    def __init__(
        self, start: _Handle, calls: MatcherCalls, vocab_size: int, end_token_ids: Sequence[int]
    ) -> None:
        super().__init__(None, vocab_size, end_token_ids)
        self.calls = calls
        self.instead = (c_int32 * len(end_token_ids))(*end_token_ids)
        self._start = start

    def new_matcher(self, stop_token_ids: Sequence[int], min_tokens: int) -> "NativeMatcher":
        """Return a matcher at the grammar's start, in some microseconds; see Grammar."""
        row = MatchedRow(
            num_stops=len(stop_token_ids),
            num_instead=len(self.instead),
            num_words=len(self.no_tokens) // 4,
            end=self.vocab_size,
            min_tokens=min_tokens,
        )
        stops = (c_int32 * len(stop_token_ids))(*stop_token_ids)
        with self._lock:
            return NativeMatcher(self, self._start, row, stops)


class NativeMatcher:
    """A Matcher by the library's C interface.

    row  how a MaskLane knows it
    """

    is_native = True

    __slots__ = ("_grammar", "_handle", "_own", "_stops", "row")

    def __init__(
        self, grammar: NativeGrammar, origin: _Handle, row: MatchedRow, stops: ctypes.Array[c_int32]
    ) -> None:
        """Begin where origin stands; row, one of its own, has the rest."""
        library = _loaded()
        self._grammar = grammar
        self._handle = _Handle(
            library.llg_clone_constraint(origin.address), library.llg_free_constraint
        )
        self._stops = stops
        self._own = bytearray(len(grammar.no_tokens))
        self.row = row
        row.matcher = self._handle.address
        row.mask = ctypes.addressof(ctypes.c_char.from_buffer(self._own))
        row.stops = ctypes.addressof(stops)
        row.instead = ctypes.addressof(grammar.instead)

    def copy(self) -> "NativeMatcher":
        row = MatchedRow.from_buffer_copy(self.row)
        copied = NativeMatcher(self._grammar, self._handle, row, self._stops)
        copied._own[:] = self._own
        return copied

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        advance(self._grammar.calls, self.row, token_ids)
        if reason := self.failure():
            raise ValueError(reason)
        return self._own

    def failure(self) -> str | None:
        """Return why it can't go on, once its thread has settled; None where it can."""
        if not self.row.status:
            return None
        if self.row.status == _NOTHING_ALLOWED:
            return NOTHING_ALLOWED
        library = _loaded()
        error = library.llg_get_error(self._handle.address) or b""
        return cannot_go_on(error.decode(errors="replace"))
