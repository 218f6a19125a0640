"""The native CPU backend: the Backend protocol over the compiled kernels of csrc/."""

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from ctypes import byref
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels.backend import (
    DRAW_SETTINGS,
    Activation,
    HeadNorms,
    LayerWeights,
    QuantizedActivations,
    StepLayout,
    TernaryHead,
)
from bitwatt_kernels.cpu.abi import ACTIVATIONS, DTYPES, CacheView, RopeTable
from bitwatt_kernels.cpu.dense import has_tile_kernels
from bitwatt_kernels.cpu.library import (
    cache_dtype_of,
    check,
    dtype_of,
    instruction_sets,
    load_library,
)
from bitwatt_kernels.cpu.native_layer import NativeLayers, head_norm_pointers, step_call
from bitwatt_kernels.cpu.prepared import PreparedDense, PreparedInt8Head, PreparedTernary
from bitwatt_kernels.cpu.row_blocks import RowBlocks
from bitwatt_kernels.cpu.threads import count_threads
from bitwatt_kernels.cpu.token_masks import MaskLane, MatcherCalls
from bitwatt_kernels.cpu.torch_backend import TorchBackend
from bitwatt_kernels.errors import BackendError, DtypeError, ShapeError
from bitwatt_kernels.kv_blocks import head_dim_of
from bitwatt_kernels.layer import LayersByOperations, has_normed_parts, ternary_head
from bitwatt_kernels.packing import TernaryWeight
from bitwatt_kernels.reference.linear import check_group

__all__ = ["NativeBackend"]

_NO_ACTIVATION = -1
_WRITTEN_AT_ONCE_BYTES = 1 << 24


class NativeBackend(LayersByOperations):
    """Every operation of the Backend protocol in C++, chosen by instruction set at run time.

    A token's result depends neither on the other tokens of its step, nor on the number of threads,
    nor on how a prompt is cut into chunks. Calls release the GIL; those of several Python threads
    take turns. Not to be used in a child after os.fork: the kernels' threads stay in the parent.
    """

    name = "native"

    def __init__(
        self,
        device: torch.device,
        *,
        batch_invariant: bool = True,
        instruction_set: str | None = None,
        num_threads: int | None = None,
        library: Path | None = None,
    ) -> None:
        """Start the backend; its threads start with the first call that needs them.

        batch_invariant  False leaves dense_linear to oneDNN where the CPU has AMX for 16-bit
                         floats, which these kernels don't use yet; all else is always so
        instruction_set  one of library.instruction_sets(); None takes the fastest that runs here
        num_threads      None takes all cores the process may use
        library          another build of the kernels than the installed one
        Raises  BackendError if the kernels were not built, or cannot run here as asked
        """
        if device.type != "cpu":
            raise BackendError(f"the native kernels run on a CPU, not on {device}")
        self.device = device
        self.batch_invariant = batch_invariant
        self._dense = TorchBackend(device, batch_invariant=batch_invariant)
        self._library = load_library(library)
        available = instruction_sets(library)
        chosen = available[0] if instruction_set is None else instruction_set
        if chosen not in available:
            raise BackendError(
                f"instruction set {chosen!r} does not run here; "
                f"these do: {', '.join(available)} (--cpu-isa)"
            )
        self.instruction_set = chosen
        self.num_threads = count_threads(num_threads)
        context = self._library.bw_create(chosen.encode(), self.num_threads)
        self._context = ctypes.c_void_p(context)
        self._blocks = RowBlocks(self._library, self._context)
        self._close = weakref.finalize(self, self._library.bw_destroy, self._context)

    def prepare_ternary(self, weight: TernaryWeight) -> PreparedTernary:
        return self._blocks.ternary(weight)

    def prepare_head(
        self, weight: Tensor, *, bits: Literal[8, 16] = 16
    ) -> PreparedDense | PreparedInt8Head:
        return self._blocks.head(weight, bits=bits)

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        """Return them for one call a step; layers of NormedParts for a call an operation."""
        if any(has_normed_parts(layer) for layer in layers):
            return super().prepare_layers(layers)
        return NativeLayers.of(layers)

    def prepare_dense(self, weight: Tensor) -> Tensor | PreparedDense:
        if not self.batch_invariant and has_tile_kernels(weight.dtype):
            return self._dense.prepare_dense(weight)
        return self._blocks.dense(weight)

    def nbytes(self, prepared: object) -> int:
        match prepared:
            case TernaryHead():
                return self.nbytes(prepared.weight)
            case PreparedTernary() | PreparedDense() | PreparedInt8Head():
                return prepared.nbytes
            case Tensor():
                return self._dense.nbytes(prepared)
            case _:
                raise TypeError(f"{type(prepared).__name__} was not prepared by this backend")

    def embed(self, token_ids: Tensor, embedding: object) -> Tensor:
        if isinstance(embedding, Tensor):
            return self._dense.embed(token_ids, embedding)
        if isinstance(embedding, TernaryHead):
            return self._blocks.ternary_rows(token_ids, embedding.weight, embedding.dtype)
        assert isinstance(embedding, PreparedDense | PreparedInt8Head)
        return self._blocks.embed(token_ids, embedding)

    def quantize(self, x: Tensor, *, group: int | None = None) -> QuantizedActivations:
        return self._quantize(x, x.shape[1], _NO_ACTIVATION, None, 0.0, group)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._elementwise(x, x.shape[1], _NO_ACTIVATION, weight, eps)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, *, group: int | None = None
    ) -> QuantizedActivations:
        return self._quantize(x, x.shape[1], _NO_ACTIVATION, weight, eps, group)

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return self._elementwise(gate_up, gate_up.shape[1] // 2, ACTIVATIONS[activation], None, 0.0)

    def gated_activation_quantize(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        *,
        group: int | None = None,
    ) -> QuantizedActivations:
        width = gate_up.shape[1] // 2
        return self._quantize(gate_up, width, ACTIVATIONS[activation], weight, eps, group)

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(weight, PreparedTernary)
        num_tokens, K = x.codes.shape
        x.check_fit(weight.in_features, weight.group)
        out = torch.empty(num_tokens, weight.out_features, dtype=dtype)
        if residual is not None:
            _require_fit("residual", residual, dtype, out.shape)
        self._linear(x, 2, weight.blocks, weight.scales, weight.bias, residual, out, K)
        return out

    def _linear(
        self,
        x: QuantizedActivations,
        bits: int,
        blocks: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        num_columns: int,
    ) -> None:
        check(
            self._library.bw_linear(
                self._context,
                x.codes.data_ptr(),
                x.scales.data_ptr(),
                x.sums.data_ptr(),
                bits,
                blocks.data_ptr(),
                scales.data_ptr(),
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
                dtype_of(out),
                *out.shape,
                num_columns,
                x.group or max(num_columns, 1),
                DTYPES[scales.dtype],
            )
        )

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        if not isinstance(layers, NativeLayers):
            return super().ternary_layers(h, layers, rope, kv_caches, layout)
        num_layers = kv_caches.shape[0]
        num_blocks, num_groups, head_dim = _cache_sizes(kv_caches[0])
        _require_contiguous(
            h,
            rope,
            kv_caches,
            layout.positions,
            layout.slots,
            layout.query_starts,
            layout.context_lens,
            layout.block_tables,
        )
        given = (h.shape[1], num_layers, num_groups, head_dim, rope.shape[1])
        head_dims = (layers.head_dim, layers.head_dim)
        if given != (layers.hidden_size, len(layers.layers), layers.num_groups, *head_dims):
            raise ShapeError(
                f"h is {list(h.shape)}, rope {list(rope.shape)} and the caches "
                f"{list(kv_caches.shape)}; the {len(layers.layers)} layers have hidden_size "
                f"{layers.hidden_size} and {layers.num_groups} key-value heads of {layers.head_dim}"
            )
        out = torch.empty_like(h)
        check(
            self._library.bw_ternary_layers(
                self._context,
                layers.layers,
                num_layers,
                byref(step_call(layout)),
                byref(CacheView(kv_caches.data_ptr(), num_blocks, cache_dtype_of(kv_caches))),
                byref(RopeTable(rope.data_ptr(), rope.shape[0])),
                h.data_ptr(),
                out.data_ptr(),
                dtype_of(h),
            )
        )
        return out

    def dense_linear(
        self, x: Tensor, weight: object, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        if isinstance(weight, Tensor):
            return self._dense.dense_linear(x, weight, bias, residual)
        assert isinstance(weight, PreparedDense)
        out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
        if bias is not None:
            _require_fit("bias", bias, x.dtype, out.shape[1:])
        if residual is not None:
            _require_fit("residual", residual, x.dtype, out.shape)
        # Widened: pairs of bfloat16 (AVX512_BF16) take a prompt twice as long on a Sapphire Rapids,
        # and no less for one token.
        self._dense_linear(x.float(), weight, bias, residual, out)
        return out

    def _dense_linear(
        self,
        x: Tensor,
        weight: PreparedDense,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        _require_contiguous(x)
        if x.shape[1] != weight.in_features:
            raise ShapeError(f"x has {x.shape[1]} features; the matrix takes {weight.in_features}")
        check(
            self._library.bw_dense_linear(
                self._context,
                x.data_ptr(),
                dtype_of(x),
                weight.blocks.data_ptr(),
                DTYPES[weight.dtype],
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
                dtype_of(out),
                *out.shape,
                weight.in_features,
            )
        )

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        num_blocks, num_groups, head_dim = _cache_sizes(kv_cache)
        num_tokens = qkv.shape[0]
        _require_contiguous(qkv, rope, layout.positions, layout.slots)
        if qkv.shape[1] != (num_heads + 2 * num_groups) * head_dim or rope.shape[1] != head_dim:
            raise ShapeError(
                f"qkv is {list(qkv.shape)} and rope {list(rope.shape)} for {num_heads} query "
                f"heads, {num_groups} key-value heads and head_dim {head_dim}"
            )
        norms = head_norm_pointers(head_norms, head_dim)
        queries = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
        check(
            self._library.bw_rope_and_cache(
                self._context,
                qkv.data_ptr(),
                dtype_of(qkv),
                rope.data_ptr(),
                rope.shape[0],
                kv_cache.data_ptr(),
                cache_dtype_of(kv_cache),
                num_blocks,
                layout.positions.data_ptr(),
                layout.slots.data_ptr(),
                queries.data_ptr(),
                *norms,
                0.0 if head_norms is None else head_norms.eps,
                num_tokens,
                num_heads,
                num_groups,
                head_dim,
            )
        )
        return queries

    def attention(
        self, queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float
    ) -> Tensor:
        num_blocks, num_groups, head_dim = _cache_sizes(kv_cache)
        num_tokens, num_heads, _ = queries.shape
        _require_contiguous(queries, layout.query_starts, layout.context_lens, layout.block_tables)
        if num_heads % num_groups or queries.shape[2] != head_dim:
            raise ShapeError(
                f"queries are {list(queries.shape)} for a cache of {num_groups} key-value heads "
                f"and head_dim {head_dim}"
            )
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=queries.dtype)
        check(
            self._library.bw_attention(
                self._context,
                queries.data_ptr(),
                dtype_of(queries),
                kv_cache.data_ptr(),
                cache_dtype_of(kv_cache),
                num_blocks,
                layout.query_starts.data_ptr(),
                layout.context_lens.data_ptr(),
                layout.block_tables.data_ptr(),
                layout.block_tables.shape[1],
                out.data_ptr(),
                num_tokens,
                layout.context_lens.shape[0],
                num_heads,
                num_groups,
                head_dim,
                scale,
            )
        )
        return out

    def head(self, x: Tensor, weight: object) -> Tensor:
        if isinstance(weight, TernaryHead):
            return ternary_head(self, x, weight)
        if isinstance(weight, PreparedInt8Head):
            return self._int8_head(self.quantize(x), weight)
        assert isinstance(weight, PreparedDense)
        logits = torch.empty(x.shape[0], weight.out_features)
        self._dense_linear(x, weight, None, None, logits)
        return logits

    def _int8_head(self, x: QuantizedActivations, weight: PreparedInt8Head) -> Tensor:
        _require_width(x.codes, weight.hidden_size)
        if weight.columns != weight.hidden_size:
            padding = (0, weight.columns - weight.hidden_size)
            x = replace(x, codes=F.pad(x.codes, padding))
        logits = torch.empty(x.codes.shape[0], weight.vocab_size)
        self._linear(x, 8, weight.blocks, weight.scales, None, None, logits, weight.columns)
        return logits

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        """Give the tokens that a row's mask lacks a logit of -inf, in place.

        logits  [.., vocab_size] float32
        rows    M of logits' rows, each once
        bits    [M, words] int32: a bit a token, the lowest first, for vocab_size at least
        """
        _require_masks(logits, bits, rows)
        where = torch.tensor(rows, dtype=torch.int64)
        check(
            self._library.bw_mask(
                self._context,
                logits.data_ptr(),
                where.data_ptr(),
                bits.data_ptr(),
                len(rows),
                logits.shape[1],
                bits.shape[1],
            )
        )

    def draw_tokens(
        self,
        logits: Tensor,
        settings: Tensor,
        bits: Tensor | None,
        best: Tensor | None = None,  # noqa: ARG002  # of a GPU's head
    ) -> Tensor:
        """Return a token for each row of logits, [R] int64; -1 where none can be drawn.

        logits    [R, vocab_size] float32
        settings  [R, 6] float64: temperature, 0 for the largest logit's token; top_k, 0 for all;
                  top_p; min_p; a number in [0, 1) that picks the token, as in
                  bitwatt.model.truncation_sampling; and the row's mask, a row of bits or -1
        bits      [M, words] int32, as mask_logits takes them; None where no row has one
        """
        num_rows, vocab_size = logits.shape
        _require_contiguous(logits, settings)
        if (logits.dtype, settings.dtype) != (torch.float32, torch.float64):
            raise DtypeError(
                f"logits are {logits.dtype} and settings {settings.dtype}; "
                "expected float32 and float64"
            )
        if settings.shape != (num_rows, len(DRAW_SETTINGS)):
            raise ShapeError(f"settings are {list(settings.shape)} for {num_rows} rows")
        if bits is not None:
            _require_masks(logits, bits)
        tokens = torch.empty(num_rows, dtype=torch.int64)
        check(
            self._library.bw_draw(
                self._context,
                logits.data_ptr(),
                settings.data_ptr(),
                None if bits is None else bits.data_ptr(),
                tokens.data_ptr(),
                num_rows,
                vocab_size,
                *((0, 0) if bits is None else bits.shape),
            )
        )
        return tokens

    def mask_lane(self, calls: MatcherCalls) -> MaskLane:
        """Return what advances matchers on this backend's threads, beside a step's Python."""
        return MaskLane(calls, self._context)

    def measure_read_bandwidth(
        self,
        num_bytes: int = 1 << 28,
        *,
        num_passes: int = 8,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Return the bytes a second this backend's threads read from memory, best of the passes.

        num_bytes  far more than the caches hold; allocated, written a byte a page and let go
        check      called every some milliseconds; what it raises ends the measurement
        """
        buffer = self._blocks.area(num_bytes)
        for start in range(0, num_bytes, _WRITTEN_AT_ONCE_BYTES):
            check()
            # A page that was written to is one of its own: the others are all one page of zeros.
            buffer[start : start + _WRITTEN_AT_ONCE_BYTES : PAGESIZE].zero_()
        seconds = []
        for _ in range(num_passes):
            check()
            started = time.perf_counter()
            self._library.bw_read(self._context, buffer.data_ptr(), num_bytes // 8)
            seconds.append(time.perf_counter() - started)
        return num_bytes / min(seconds)

    def _quantize(
        self,
        x: Tensor,
        width: int,
        activation: int,
        weight: Tensor | None,
        eps: float,
        group: int | None,
    ) -> QuantizedActivations:
        check_group(width, group)
        num_tokens = x.shape[0]
        shape = (num_tokens,) if group is None else (num_tokens, width // group)
        codes = torch.empty(num_tokens, width, dtype=torch.int8)
        scales = torch.empty(shape)
        sums = torch.empty(shape, dtype=torch.int32)
        pointers = (None, codes.data_ptr(), scales.data_ptr(), sums.data_ptr())
        self._call_elementwise(x, width, activation, weight, eps, pointers, group)
        return QuantizedActivations(codes, scales, sums)

    def _elementwise(
        self, x: Tensor, width: int, activation: int, weight: Tensor | None, eps: float
    ) -> Tensor:
        out = torch.empty(x.shape[0], width, dtype=x.dtype)
        pointers = (out.data_ptr(), None, None, None)
        self._call_elementwise(x, width, activation, weight, eps, pointers)
        return out

    def _call_elementwise(
        self,
        x: Tensor,
        width: int,
        activation: int,
        weight: Tensor | None,
        eps: float,
        outputs: tuple[int | None, ...],
        group: int | None = None,
    ) -> None:
        _require_contiguous(x)
        if weight is not None and (weight.shape != (width,) or not weight.is_contiguous()):
            raise ShapeError(f"weight has shape {list(weight.shape)}; expected [{width}]")
        check(
            self._library.bw_elementwise(
                self._context,
                x.data_ptr(),
                dtype_of(x),
                activation,
                None if weight is None else weight.data_ptr(),
                0 if weight is None else dtype_of(weight),
                eps,
                *outputs,
                x.shape[0],
                width,
                group or max(width, 1),
            )
        )


def _require_masks(logits: Tensor, bits: Tensor, rows: Sequence[int] | None = None) -> None:
    """Check masks of some rows of logits; without rows the kernel checks which they are."""
    _require_contiguous(logits, bits)
    if (logits.dtype, bits.dtype) != (torch.float32, torch.int32):
        raise DtypeError(
            f"logits are {logits.dtype} and masks {bits.dtype}; expected float32 and int32"
        )
    num_rows, vocab_size = logits.shape
    num_masks = bits.shape[0] if rows is None else len(rows)
    if bits.shape[0] != num_masks or 32 * bits.shape[1] < vocab_size:
        raise ShapeError(
            f"masks are {list(bits.shape)} words of 32 bits for {num_masks} rows "
            f"of {vocab_size} tokens"
        )
    if rows and not 0 <= min(rows) <= max(rows) < num_rows:
        raise ShapeError(f"a mask is of one of the rows {rows}; the logits have {num_rows}")


def _require_contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ShapeError(f"a tensor of strides {tensor.stride()} is not contiguous")


def _require_fit(name: str, given: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if given.shape != shape or given.dtype != dtype or not given.is_contiguous():
        raise ShapeError(
            f"{name} is {given.dtype} {list(given.shape)}; "
            f"expected {dtype} {list(shape)}, contiguous"
        )


def _require_width(x: Tensor, hidden_size: int) -> None:
    if x.shape[1] != hidden_size:
        raise ShapeError(f"x has {x.shape[1]} features; the head takes {hidden_size}")


def _cache_sizes(kv_cache: Tensor) -> tuple[int, int, int]:
    """Return the blocks, key-value heads and head_dim of a layer's cache."""
    _require_contiguous(kv_cache)
    return kv_cache.shape[1], kv_cache.shape[2], head_dim_of(kv_cache)
