"""The native CPU backend: the Backend protocol over the compiled kernels of csrc/."""

import ctypes
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE, Activation, QuantizedActivations, StepLayout
from bitwatt_kernels.cpu.library import instruction_sets, load_library
from bitwatt_kernels.cpu.threads import available_threads
from bitwatt_kernels.cpu.torch_backend import TorchBackend
from bitwatt_kernels.errors import BackendError, DtypeError, KernelError, ShapeError
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight
from bitwatt_kernels.reference.head import quantize_head

__all__ = ["NativeBackend", "PreparedInt8Head", "PreparedTernary"]

# As in csrc/calls.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS: dict[Activation, int] = {"relu2": 0, "silu": 1}
_NO_ACTIVATION = -1
_ROWS_PER_BLOCK = 16
_ALIGNMENT = 64

# As in csrc/api.cpp.
_STATUS = {
    1: "a block table names a block that the cache does not have, or has too few blocks",
    2: "a slot lies past the end of the cache",
    3: "a position lies past the end of the rope table",
}


@dataclass(frozen=True, slots=True)
class PreparedTernary:
    """A ternary matrix in the kernels' row blocks, rows padded to a multiple of 16.

    blocks  [rows / 16 · in_features / 16 · 64] uint8, 64-byte aligned; layout in csrc/ternary.h
    scales  [rows] float32, zeros past out_features
    bias    [rows] float32, or None
    """

    blocks: Tensor
    scales: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    blocks_pointer: int
    scales_pointer: int
    bias_pointer: int | None


@dataclass(frozen=True, slots=True)
class PreparedInt8Head:
    """A head rounded to int8: W[n, k] ≈ codes[n, k] · scales[n].

    codes   [vocab_size, hidden_size] int8 in [-127, 127]
    scales  [vocab_size] float32
    sums    [vocab_size] int32, Σ codes over hidden_size
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor


class NativeBackend:
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

        batch_invariant  False lets dense_linear use torch's fastest kernels; all else is always so
        instruction_set  one of library.instruction_sets(); None takes BITWATT_CPU_ISA, or else
                         the fastest that runs here
        num_threads      None takes BITWATT_CPU_THREADS, or else the cores the process may use
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
        chosen = instruction_set or os.environ.get("BITWATT_CPU_ISA") or available[0]
        if chosen not in available:
            raise BackendError(
                f"instruction set {chosen!r} does not run here (BITWATT_CPU_ISA); "
                f"these do: {', '.join(available)}"
            )
        self.instruction_set = chosen
        self.num_threads = num_threads or _threads_from_environment() or available_threads()
        context = self._library.bw_create(chosen.encode(), self.num_threads)
        self._context = ctypes.c_void_p(context)
        self._close = weakref.finalize(self, self._library.bw_destroy, self._context)

    def prepare_ternary(self, weight: TernaryWeight) -> PreparedTernary:
        """Return the weight repacked into row blocks: two bits a weight, and the only copy kept.

        weight.codes may lie in a mapped file; its pages are read once.
        """
        N, K = weight.out_features, weight.in_features
        if K == 0 or K % IN_FEATURES_MULTIPLE:
            raise ShapeError(
                f"in_features is {K}; the kernels take multiples of {IN_FEATURES_MULTIPLE}"
            )
        rows = -(-N // _ROWS_PER_BLOCK) * _ROWS_PER_BLOCK
        blocks = self._allocate(rows * K // 4)
        codes = weight.codes.contiguous()
        self._check(
            self._library.bw_repack(self._context, codes.data_ptr(), blocks.data_ptr(), N, K)
        )
        scales = torch.zeros(rows)
        scales[:N] = weight.scales
        bias = None
        if weight.bias is not None:
            bias = torch.zeros(rows)
            bias[:N] = weight.bias
        return PreparedTernary(
            blocks,
            scales,
            bias,
            N,
            K,
            blocks.data_ptr(),
            scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )

    def prepare_head(
        self, weight: Tensor, *, bits: Literal[8, 16] = 16
    ) -> Tensor | PreparedInt8Head:
        """Return the head's matrix as it is: a tied embedding shares its memory. Or in 8 bits."""
        _dtype_of(weight)
        if bits == 16:
            return weight.contiguous()
        head = quantize_head(weight)
        return PreparedInt8Head(head.codes, head.scales, head.codes.sum(dim=1, dtype=torch.int32))

    def prepare_dense(self, weight: Tensor) -> Tensor:
        return self._dense.prepare_dense(weight)

    def nbytes(self, prepared: object) -> int:
        match prepared:
            case PreparedTernary():
                tensors = [prepared.blocks, prepared.scales, prepared.bias]
                return sum(t.nbytes for t in tensors if t is not None)
            case PreparedInt8Head():
                return prepared.codes.nbytes + prepared.scales.nbytes + prepared.sums.nbytes
            case Tensor():
                return self._dense.nbytes(prepared)
            case _:
                raise TypeError(f"{type(prepared).__name__} was not prepared by this backend")

    def quantize(self, x: Tensor) -> QuantizedActivations:
        return self._quantize(x, x.shape[1], _NO_ACTIVATION, None, 0.0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._elementwise(x, x.shape[1], _NO_ACTIVATION, weight, eps)

    def rms_norm_quantize(self, x: Tensor, weight: Tensor, eps: float) -> QuantizedActivations:
        return self._quantize(x, x.shape[1], _NO_ACTIVATION, weight, eps)

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return self._elementwise(
            gate_up, gate_up.shape[1] // 2, _ACTIVATIONS[activation], None, 0.0
        )

    def gated_activation_quantize(
        self, gate_up: Tensor, activation: Activation, weight: Tensor | None, eps: float
    ) -> QuantizedActivations:
        return self._quantize(gate_up, gate_up.shape[1] // 2, _ACTIVATIONS[activation], weight, eps)

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(weight, PreparedTernary)
        num_tokens, K = x.codes.shape
        if weight.in_features != K:
            raise ShapeError(
                f"activations have {K} features; the weight takes {weight.in_features}"
            )
        out = torch.empty(num_tokens, weight.out_features, dtype=dtype)
        if residual is not None and (
            residual.shape != out.shape or residual.dtype != dtype or not residual.is_contiguous()
        ):
            raise ShapeError(
                f"residual is {residual.dtype} {list(residual.shape)}; "
                f"expected {dtype} {list(out.shape)}, contiguous"
            )
        self._check(
            self._library.bw_ternary_linear(
                self._context,
                x.codes.data_ptr(),
                x.scales.data_ptr(),
                x.sums.data_ptr(),
                weight.blocks_pointer,
                weight.scales_pointer,
                weight.bias_pointer,
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
                _dtype_of(out),
                num_tokens,
                weight.out_features,
                K,
            )
        )
        return out

    def dense_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return self._dense.dense_linear(x, weight, bias, residual)

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
    ) -> Tensor:
        _, num_blocks, num_groups, _, head_dim = _cache_shape(kv_cache)
        num_tokens = qkv.shape[0]
        _require_contiguous(qkv, rope, layout.positions, layout.slots)
        if qkv.shape[1] != (num_heads + 2 * num_groups) * head_dim or rope.shape[1] != head_dim:
            raise ShapeError(
                f"qkv is {list(qkv.shape)} and rope {list(rope.shape)} for {num_heads} query "
                f"heads, {num_groups} key-value heads and head_dim {head_dim}"
            )
        queries = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
        self._check(
            self._library.bw_rope_and_cache(
                self._context,
                qkv.data_ptr(),
                _dtype_of(qkv),
                rope.data_ptr(),
                rope.shape[0],
                kv_cache.data_ptr(),
                _dtype_of(kv_cache),
                num_blocks,
                layout.positions.data_ptr(),
                layout.slots.data_ptr(),
                queries.data_ptr(),
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
        _, num_blocks, num_groups, _, head_dim = _cache_shape(kv_cache)
        num_tokens, num_heads, _ = queries.shape
        _require_contiguous(queries, layout.query_starts, layout.context_lens, layout.block_tables)
        if num_heads % num_groups or queries.shape[2] != head_dim:
            raise ShapeError(
                f"queries are {list(queries.shape)} for a cache of {num_groups} key-value heads "
                f"and head_dim {head_dim}"
            )
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=queries.dtype)
        self._check(
            self._library.bw_attention(
                self._context,
                queries.data_ptr(),
                _dtype_of(queries),
                kv_cache.data_ptr(),
                _dtype_of(kv_cache),
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
        if isinstance(weight, PreparedInt8Head):
            return self._int8_head(self.quantize(x), weight)
        assert isinstance(weight, Tensor)
        num_tokens, hidden = x.shape
        vocab_size, expected = weight.shape
        if hidden != expected:
            raise ShapeError(f"x has {hidden} features; the head takes {expected}")
        _require_contiguous(x)
        logits = torch.empty(num_tokens, vocab_size)
        self._check(
            self._library.bw_head(
                self._context,
                x.data_ptr(),
                _dtype_of(x),
                weight.data_ptr(),
                _dtype_of(weight),
                logits.data_ptr(),
                num_tokens,
                vocab_size,
                hidden,
            )
        )
        return logits

    def _int8_head(self, x: QuantizedActivations, weight: PreparedInt8Head) -> Tensor:
        num_tokens, hidden = x.codes.shape
        vocab_size, expected = weight.codes.shape
        if hidden != expected:
            raise ShapeError(f"x has {hidden} features; the head takes {expected}")
        logits = torch.empty(num_tokens, vocab_size)
        self._check(
            self._library.bw_int8_head(
                self._context,
                x.codes.data_ptr(),
                x.scales.data_ptr(),
                weight.codes.data_ptr(),
                weight.scales.data_ptr(),
                weight.sums.data_ptr(),
                logits.data_ptr(),
                num_tokens,
                vocab_size,
                hidden,
            )
        )
        return logits

    def measure_read_bandwidth(self, num_bytes: int = 1 << 28) -> float:
        """Return the bytes a second this backend's threads read from memory, best of 8 passes.

        num_bytes  far more than the caches hold
        """
        buffer = self._allocate(num_bytes)
        buffer.zero_()
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            self._library.bw_read(self._context, buffer.data_ptr(), num_bytes // 8)
            seconds.append(time.perf_counter() - started)
        return num_bytes / min(seconds)

    def _quantize(
        self, x: Tensor, width: int, activation: int, weight: Tensor | None, eps: float
    ) -> QuantizedActivations:
        num_tokens = x.shape[0]
        codes = torch.empty(num_tokens, width, dtype=torch.int8)
        scales = torch.empty(num_tokens)
        sums = torch.empty(num_tokens, dtype=torch.int32)
        pointers = (None, codes.data_ptr(), scales.data_ptr(), sums.data_ptr())
        self._call_elementwise(x, width, activation, weight, eps, pointers)
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
    ) -> None:
        _require_contiguous(x)
        if weight is not None and (weight.shape != (width,) or not weight.is_contiguous()):
            raise ShapeError(f"weight has shape {list(weight.shape)}; expected [{width}]")
        self._check(
            self._library.bw_elementwise(
                self._context,
                x.data_ptr(),
                _dtype_of(x),
                activation,
                None if weight is None else weight.data_ptr(),
                0 if weight is None else _dtype_of(weight),
                eps,
                *outputs,
                x.shape[0],
                width,
            )
        )

    def _allocate(self, num_bytes: int) -> Tensor:
        """Return [num_bytes] uint8, aligned to a vector, in huge pages where there are any."""
        buffer = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
        start = -buffer.data_ptr() % _ALIGNMENT
        aligned = buffer[start : start + num_bytes]
        self._library.bw_advise_huge_pages(aligned.data_ptr(), num_bytes)
        return aligned

    def _check(self, status: int) -> None:
        if status:
            raise KernelError(_STATUS[status])


def _threads_from_environment() -> int | None:
    value = os.environ.get("BITWATT_CPU_THREADS")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise BackendError(f"BITWATT_CPU_THREADS is {value!r}; expected a count of at least 1")
    return int(value)


def _dtype_of(x: Tensor) -> int:
    try:
        return _DTYPES[x.dtype]
    except KeyError:
        raise DtypeError(
            f"{x.dtype} is not one the kernels take: bfloat16, float16 or float32"
        ) from None


def _require_contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ShapeError(f"a tensor of strides {tensor.stride()} is not contiguous")


def _cache_shape(kv_cache: Tensor) -> torch.Size:
    _require_contiguous(kv_cache)
    if kv_cache.shape[3] != BLOCK_SIZE:
        raise ShapeError(
            f"the cache has blocks of {kv_cache.shape[3]} tokens; expected {BLOCK_SIZE}"
        )
    return kv_cache.shape
