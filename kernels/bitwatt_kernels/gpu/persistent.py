"""All layers of a step that decodes a few tokens, in one kernel: an experiment, off by default.

Five kernels a layer wait for one another's last program, and each begins with a launch. Here one
grid stays on the GPU: its programs take the tiles of qkv, attention, o, gate_up and down in turn,
layer after layer, and wait in memory until all have come as far. What comes next needs weights
that depend on nothing; they are on their way meanwhile. Tiles are computed by the bodies of the
five kernels, so the bits are theirs.

The wait ends only if all programs run at once: the launch is cooperative, which CUDA refuses
where they don't fit.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE, LayerWeights, StepLayout
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.attention import decode_splits
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.few_tokens import are_fusable
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.kv_codes import cache_parts
from bitwatt_kernels.gpu.normed_linear import (
    MAX_TOKENS,
    NormedLinearConfig,
    norm_and_scale,
    normed_tile,
    prefetch_weights,
)
from bitwatt_kernels.gpu.tiles import recomputable
from bitwatt_kernels.packing import TernaryWeight

__all__ = [
    "PROGRAMS_PER_MULTIPROCESSOR",
    "PersistentLayers",
    "config_for",
    "persistent_layers_kernel",
    "wait_for_all",
]

PROGRAMS_PER_MULTIPROCESSOR = 2
"""By the machine code: so many fit by registers and shared memory on every card; not measured."""

# By the machine code, for few spills; not measured. Warps and stages are attention's.
_ONE = NormedLinearConfig(1, 16, 64, 512, 4, 4, 3)
_FEW = NormedLinearConfig(8, 32, 64, 512, 2, 4, 3)


def config_for(num_tokens: int) -> NormedLinearConfig:
    """Return the tiles of the linears."""
    return _ONE if num_tokens == 1 else _FEW


@triton.jit
def wait_for_all(arrivals_ptr, target):
    """Return when programs have come here target times in all: what they have stored is seen."""
    tl.debug_barrier()  # every thread's stores, before one thread releases them
    tl.atomic_add(arrivals_ptr, 1, sem="release")
    arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    while arrived < target:
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")


@triton.jit
def leave(arrivals_ptr, target):
    """Set the count back once all have left: no program reads it any more."""
    left = tl.atomic_add(arrivals_ptr, 1, sem="relaxed")
    if left == target + tl.num_programs(0) - 1:
        tl.store(arrivals_ptr, 0)


@triton.jit
def _meet_kernel(arrivals_ptr):
    """Return when all programs of the grid (programs,) run."""
    wait_for_all(arrivals_ptr, tl.num_programs(0))
    leave(arrivals_ptr, tl.num_programs(0))


@triton.jit
def _pointer(address_ptr, dtype: tl.constexpr):
    address = tl.multiple_of(tl.load(address_ptr), 16)
    return address.to(tl.pointer_type(dtype))


@triton.jit
def _linear(
    weight_ptr,  # [3] int64, addresses of norm, codes and scales
    arrivals_ptr,
    target,
    x_ptr,
    residual_ptr,
    y_ptr,
    num_tokens,
    eps,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """Wait for x and compute this program's tiles of normed_linear."""
    ROW_BYTES: tl.constexpr = IN_FEATURES // 4
    norm_ptr = _pointer(weight_ptr, tl.float32)
    w_ptr = _pointer(weight_ptr + 1, tl.uint8)
    w_scales_ptr = _pointer(weight_ptr + 2, tl.float32)
    first = tl.program_id(0)
    num_tiles = tl.cdiv(OUT_FEATURES, BLOCK_OUT)
    if INLINE_ASM:
        first = recomputable(first)
        zero = recomputable(num_tokens * 0) * 16
        num_tokens = recomputable(num_tokens)
        x_ptr += zero
        y_ptr += zero
        residual_ptr += zero
        prefetch_weights(first, w_ptr, OUT_FEATURES, ROW_BYTES, BLOCK_OUT, GATED)
    wait_for_all(arrivals_ptr, target)
    if first < num_tiles:
        reciprocal, scale = norm_and_scale(
            x_ptr, norm_ptr, num_tokens, IN_FEATURES, eps, TOKENS, BLOCK_IN, UNROLL, HAS_NORM
        )
        for tile in range(first, num_tiles, tl.num_programs(0)):
            normed_tile(
                tile,
                reciprocal,
                scale,
                x_ptr,
                norm_ptr,
                w_ptr,
                w_scales_ptr,
                w_scales_ptr,
                residual_ptr,
                y_ptr,
                num_tokens,
                OUT_FEATURES,
                ROW_BYTES,
                TOKENS,
                BLOCK_OUT,
                BLOCK_BYTES,
                ROW_BYTES % BLOCK_BYTES != 0,
                HAS_NORM,
                False,
                HAS_RESIDUAL,
                GATED,
                SILU,
                INLINE_ASM,
                False,
            )


@triton.jit(
    do_not_specialize=[
        "num_layers",
        "num_tokens",
        "num_sequences",
        "num_programs",
        "max_splits",
        "table_stride",
    ]
)
def persistent_layers_kernel(
    weights_ptr,  # [num_layers, 4, 3] int64, addresses of each linear's norm, codes and scales
    h_ptr,  # [num_tokens, HIDDEN]
    qkv_ptr,  # [num_tokens, QKV]
    attended_ptr,  # [num_tokens, ATTENDED]
    gated_ptr,  # [num_tokens, INTERMEDIATE] float32
    out_ptr,  # [num_tokens, HIDDEN]
    keys_ptr,  # of the first layer; the cache as decode_attention_kernel's
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tables_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    counters_ptr,
    rope_ptr,
    positions_ptr,
    slots_ptr,
    arrivals_ptr,  # [1] int32, zero before and after
    num_layers,
    num_tokens,
    num_sequences,
    num_programs,  # that take a sequence's and a head's splits
    layer_stride,  # elements of a layer's cache
    block_stride,
    table_stride,
    eps,
    scale,
    max_splits,
    HIDDEN: tl.constexpr,
    QKV: tl.constexpr,
    ATTENDED: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SUB_NORMS: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """out = h after the layers. Grid (programs,), of which all must run at once."""
    NUM_KV_HEADS: tl.constexpr = ATTENDED // (GROUP * HEAD_DIM)
    stream_ptr = h_ptr
    target = tl.num_programs(0)
    for _ in range(num_layers):
        _linear(
            weights_ptr,
            arrivals_ptr,
            target,
            stream_ptr,
            stream_ptr,
            qkv_ptr,
            num_tokens,
            eps,
            QKV,
            HIDDEN,
            TOKENS,
            BLOCK_OUT,
            BLOCK_BYTES,
            BLOCK_IN,
            UNROLL,
            True,
            False,
            False,
            SILU,
            INLINE_ASM,
        )
        target += tl.num_programs(0)
        wait_for_all(arrivals_ptr, target)
        num_items = num_sequences * NUM_KV_HEADS * num_programs
        first = tl.program_id(0)
        zero = 0
        if INLINE_ASM:
            first = recomputable(first)
            zero = recomputable(num_tokens * 0) * 16
        for item in range(first, num_items, tl.num_programs(0)):
            pair = item // num_programs
            decode_splits(
                item % num_programs,
                num_programs,
                pair % NUM_KV_HEADS,
                NUM_KV_HEADS,
                pair // NUM_KV_HEADS,
                qkv_ptr + zero,
                keys_ptr,
                values_ptr,
                key_scales_ptr,
                value_scales_ptr,
                query_starts_ptr,
                context_lens_ptr,
                tables_ptr,
                attended_ptr + zero,
                partial_ptr + zero,
                partial_max_ptr + zero,
                partial_sum_ptr + zero,
                counters_ptr,
                rope_ptr + zero,
                positions_ptr,
                slots_ptr,
                block_stride,
                table_stride,
                scale,
                max_splits,
                GROUP,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_ROWS,
                BLOCK_CONTEXT,
                SPLIT_TOKENS,
                DIM_BLOCK,
                IS_SPLIT,
                True,
                PRECISION,
                INT8,
                False,
            )
        target += tl.num_programs(0)
        _linear(
            weights_ptr + 3,
            arrivals_ptr,
            target,
            attended_ptr,
            stream_ptr,
            out_ptr,
            num_tokens,
            eps,
            HIDDEN,
            ATTENDED,
            TOKENS,
            BLOCK_OUT,
            BLOCK_BYTES,
            BLOCK_IN,
            UNROLL,
            SUB_NORMS,
            True,
            False,
            SILU,
            INLINE_ASM,
        )
        stream_ptr = out_ptr
        target += tl.num_programs(0)
        _linear(
            weights_ptr + 6,
            arrivals_ptr,
            target,
            stream_ptr,
            stream_ptr,
            gated_ptr,
            num_tokens,
            eps,
            INTERMEDIATE,
            HIDDEN,
            TOKENS,
            BLOCK_OUT,
            BLOCK_BYTES,
            BLOCK_IN,
            UNROLL,
            True,
            False,
            True,
            SILU,
            INLINE_ASM,
        )
        target += tl.num_programs(0)
        _linear(
            weights_ptr + 9,
            arrivals_ptr,
            target,
            gated_ptr,
            stream_ptr,
            out_ptr,
            num_tokens,
            eps,
            HIDDEN,
            INTERMEDIATE,
            TOKENS,
            BLOCK_OUT,
            BLOCK_BYTES,
            BLOCK_IN,
            UNROLL,
            SUB_NORMS,
            True,
            False,
            SILU,
            INLINE_ASM,
        )
        target += tl.num_programs(0)
        weights_ptr += 12
        keys_ptr += layer_stride
        values_ptr += layer_stride
        if INT8:
            key_scales_ptr += layer_stride // 4
            value_scales_ptr += layer_stride // 4
    leave(arrivals_ptr, target - tl.num_programs(0))


def _why_not(layers: Sequence[LayerWeights[Any]], gpu: Gpu) -> str | None:
    """Return why the kernel can't run such layers, or None."""
    if gpu.is_amd:
        return "it is for NVIDIA's GPUs"
    if not are_fusable(layers):
        return "its linears have scales by groups, or norms of their own"
    if any(w.bias is not None for layer in layers for w in _linears(layer)):
        return "its linears have biases"
    if any(layer.head_norms is not None for layer in layers):
        return "its heads norm queries and keys"
    if len({_form(layer) for layer in layers}) > 1:
        return "its layers differ"
    if (layers[0].attention_sub_norm is None) != (layers[0].mlp_sub_norm is None):
        return "it has one of the two sub-norms"
    qkv, o, *_ = _linears(layers[0])
    num_heads, attended = layers[0].num_heads, o.in_features
    head_dim = attended // num_heads
    if head_dim * num_heads != attended or head_dim != triton.next_power_of_2(head_dim):
        return f"{num_heads} heads of {attended} features aren't of a power of two"
    num_kv_heads = (qkv.out_features - attended) // (2 * head_dim)
    if num_heads > num_kv_heads * gpu.configs.attention.decode.block_rows:
        return f"{num_heads} heads share the keys of {num_kv_heads}"
    return None


def _linears(layer: LayerWeights[Any]) -> tuple[Any, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _norms(layer: LayerWeights[Any]) -> tuple[Tensor | None, ...]:
    """Return what each linear's input is normed by."""
    return layer.input_norm, layer.attention_sub_norm, layer.mlp_norm, layer.mlp_sub_norm


def _form(layer: LayerWeights[Any]) -> tuple[object, ...]:
    """Return all that layers which one kernel runs have in common."""
    shapes = tuple(w.codes.shape for w in _linears(layer))
    has_norms = (norm is not None for norm in _norms(layer))
    numbers = (layer.num_heads, layer.attention_scale, layer.activation, layer.eps)
    return (*shapes, *has_norms, *numbers)


class PersistentLayers:
    """A model's layers with the addresses of their weights on the device."""

    def __init__(
        self,
        layers: Sequence[LayerWeights[Any]],
        gpu: Gpu,
        num_programs: int | None = None,
    ) -> None:
        """Raises BackendError where the kernel doesn't know such layers, or the GPU can't run it.

        num_programs  of the grid; None for as many as run at once
        """
        reason = _why_not(layers, gpu)
        if reason is not None:
            raise BackendError(
                f"a persistent step doesn't take this model: {reason} (--persistent-step)"
            )
        self.layers = tuple(layers)
        self._gpu = gpu
        self._first = self.layers[0]
        if num_programs is None:
            wanted = PROGRAMS_PER_MULTIPROCESSOR * gpu.num_multiprocessors
            num_programs = 1 if INTERPRETED else wanted
        self._num_programs = num_programs
        addresses = [
            [
                (0 if norm is None else norm.data_ptr(), w.codes.data_ptr(), w.scales.data_ptr())
                for norm, w in zip(_norms(layer), _linears(layer), strict=True)
            ]
            for layer in self.layers
        ]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=gpu.device)
        self._arrivals = torch.zeros(1, dtype=torch.int32, device=gpu.device)
        with self._at_once():
            _meet_kernel[(num_programs,)](
                self._arrivals, launch_cooperative_grid=True, **gpu.launch_options(4)
            )

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """Raise BackendError where the launch inside is refused."""
        try:
            yield
        except Exception as error:  # Triton raises whatever its compilers and the driver raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise BackendError(
                f"{self._gpu.name} can't run {self._num_programs} programs at once, which a "
                f"persistent step takes: {reason} (--persistent-step)"
            ) from error

    def can_run(self, h: Tensor, layout: StepLayout) -> bool:
        """Return whether the kernel takes the step: at most 8 tokens, each of its own sequence."""
        return 1 <= len(h) <= MAX_TOKENS and layout.max_query_len <= 1

    def run(self, h: Tensor, rope: Tensor, kv_caches: Tensor, layout: StepLayout) -> Tensor:
        """Return the residual stream after the layers, [T, hidden_size], as few_tokens.run_layers.

        Raises  ShapeError unless the cache's blocks are contiguous, BackendError where the grid is
                more than runs at once
        """
        gpu, layer = self._gpu, self._first
        assert isinstance(layer.qkv, TernaryWeight)
        assert isinstance(layer.o, TernaryWeight)
        assert isinstance(layer.down, TernaryWeight)
        cache = cache_parts(kv_caches[0])
        linear, attention = config_for(len(h)), gpu.configs.attention
        num_sequences = len(layout.context_lens)
        pairs = num_sequences * cache.num_kv_heads
        num_splits = max(1, triton.cdiv(layout.max_context_len, attention.split_tokens))
        num_partials = pairs * num_splits if num_splits > 1 else 1

        def empty(*shape: int, dtype: torch.dtype = h.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=h.device)

        group = layer.num_heads // cache.num_kv_heads
        hidden, attended = layer.qkv.in_features, layer.o.in_features
        intermediate = layer.down.in_features
        out = empty(len(h), hidden)
        with self._at_once():
            persistent_layers_kernel[(self._num_programs,)](
                self._addresses,
                h,
                empty(len(h), layer.qkv.out_features),
                empty(len(h), attended),
                empty(len(h), intermediate, dtype=torch.float32),
                out,
                cache.keys,
                cache.values,
                cache.key_scales,
                cache.value_scales,
                layout.query_starts,
                layout.context_lens,
                layout.block_tables,
                empty(num_partials, group, cache.dim_block, dtype=torch.float32),
                empty(num_partials, group, dtype=torch.float32),
                empty(num_partials, group, dtype=torch.float32),
                gpu.counters,
                rope,
                layout.positions,
                layout.slots,
                self._arrivals,
                len(self.layers),
                len(h),
                num_sequences,
                max(1, min(num_splits, self._num_programs // pairs)),
                kv_caches.stride(0),
                cache.block_stride,
                layout.block_tables.stride(0),
                layer.eps,
                layer.attention_scale * math.log2(math.e),
                num_splits,
                HIDDEN=hidden,
                QKV=layer.qkv.out_features,
                ATTENDED=attended,
                INTERMEDIATE=intermediate,
                SUB_NORMS=layer.mlp_sub_norm is not None,
                SILU=layer.activation == "silu",
                TOKENS=linear.tokens,
                BLOCK_OUT=linear.block_out,
                BLOCK_BYTES=linear.block_bytes,
                BLOCK_IN=linear.block_in,
                UNROLL=linear.unroll,
                GROUP=group,
                HEAD_DIM=cache.head_dim,
                BLOCK_SIZE=BLOCK_SIZE,
                BLOCK_ROWS=attention.decode.block_rows,
                BLOCK_CONTEXT=attention.block_context,
                SPLIT_TOKENS=attention.split_tokens,
                DIM_BLOCK=cache.dim_block,
                IS_SPLIT=num_splits > 1,
                PRECISION=gpu.dot_precision(h.dtype),
                INT8=cache.is_int8,
                INLINE_ASM=gpu.inline_asm,
                launch_cooperative_grid=True,
                **gpu.launch_options(attention.decode.num_warps, attention.decode.num_stages),
            )
        return out
