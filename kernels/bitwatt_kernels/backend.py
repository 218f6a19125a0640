"""The protocol every backend meets.

Shapes use T for the tokens of a step, S for its sequences, H and G for query and key-value
heads, D for head_dim. A backend's result for a token never depends on the other tokens of the
step: sums that decide it run in an order fixed by the token's own sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.packing import TernaryWeight, group_of

__all__ = [
    "BLOCK_SIZE",
    "DRAW_SETTINGS",
    "Activation",
    "Backend",
    "DenseLinear",
    "HeadNorms",
    "LayerWeights",
    "MeasuresMemory",
    "NormedParts",
    "QuantizedActivations",
    "StepLayout",
    "TernaryHead",
]

BLOCK_SIZE = 16  # tokens a KV-cache block holds

DRAW_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "uniform", "mask")
"""What a token is drawn by: float64 numbers, side by side in a row of [R, 6]."""

Activation = Literal["relu2", "silu"]

W = TypeVar("W", covariant=True)  # a linear's prepared weight


@dataclass(frozen=True, slots=True)
class QuantizedActivations:
    """Activations quantized to int8 per token, or per group of a token's: x ≈ codes / scales.

    codes   [T, in_features] int8 in [-128, 127]
    scales  [T] or [T, in_features // group] float32, 127 / clamp(max|x|, 1e-5)
    sums    int32, shaped as scales, Σ codes of each: undoes the +1 of the weights' codes
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor

    @property
    def group(self) -> int | None:
        """How many neighbours of a token share a scale; None where all do."""
        return group_of(self.scales, self.codes.shape[1])

    def check_fit(self, in_features: int, group: int | None) -> None:
        """Raise ShapeError where they aren't what a weight of in_features and group takes."""
        if self.codes.shape[1] != in_features:
            raise ShapeError(
                f"activations have {self.codes.shape[1]} features; the weight takes {in_features}"
            )
        if self.group != group:
            raise ShapeError(
                f"activations have a scale to every {self.group or in_features} features; "
                f"the weight takes one to every {group or in_features}"
            )


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Which tokens of a step belong to which sequence, and where their keys and values live.

    The tokens of a sequence are neighbours and in order; a sequence's last query token is its
    last token so far. Padding sequences of a bucketed batch have context_lens 0 and slots -1.

    positions      [T] int64, index of each token in its sequence
    slots          [T] int64, block · BLOCK_SIZE + offset of each token's key and value
    query_starts   [S + 1] int32, first token of each sequence
    context_lens   [S] int32, tokens of each sequence up to and with this step
    block_tables   [S, max_blocks] int32, blocks of each sequence; entries past its length unread
    max_query_len  most tokens one sequence brings to the step
    max_context_len  most tokens one sequence attends to
    """

    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A linear of 16-bit weights.

    weight  what prepare_dense returned
    bias    [out_features] in its dtype, or None
    """

    weight: object
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each head's query and key before they are rotated, as in Qwen3.

    queries, keys  [D] float32
    """

    queries: Tensor
    keys: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class TernaryHead(Generic[W]):
    """A head of ternary weights, and an embedding.

    weight  what prepare_ternary returned of [vocab_size, hidden_size]
    dtype   of its rows as embeddings
    """

    weight: W
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class NormedParts(Generic[W]):
    """Linears side by side, each of which norms its input by a weight of its own.

    norms    [in_features] float32 each
    weights  what prepare_ternary returned, or a DenseLinear each
    """

    norms: tuple[Tensor, ...]
    weights: tuple[W, ...]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights(Generic[W]):
    """A transformer layer; layer.py says what it computes.

    Norms are [width] float32, and a sub-norm None where the model has none, as head_norms is; qkv,
    o, gate_up and down are what prepare_ternary returned or a DenseLinear, queries ‖ keys ‖ values
    and gate ‖ up as one matrix, or their parts where each norms its own input.
    """

    num_heads: int
    attention_scale: float
    activation: Activation
    eps: float
    input_norm: Tensor
    qkv: W | NormedParts[W]
    head_norms: HeadNorms | None = None
    attention_sub_norm: Tensor | None
    o: W | NormedParts[W]
    mlp_norm: Tensor
    gate_up: W | NormedParts[W]
    mlp_sub_norm: Tensor | None
    down: W | NormedParts[W]


class Backend(Protocol):
    """One arithmetic on one device. Methods are named alike in every backend, test and bench.

    Activations are bfloat16, float16 or float32 and contiguous, and every result is in x's
    dtype unless said otherwise. Sums are taken in float32 or wider and rounded once.
    """

    name: str
    device: torch.device
    batch_invariant: bool

    def prepare_ternary(self, weight: TernaryWeight) -> object:
        """Return the weight in the form this backend's ternary_linear reads fastest, on device."""
        ...

    def prepare_head(self, weight: Tensor, *, bits: Literal[8, 16] = 16) -> object:
        """Return [vocab_size, hidden_size] in the form this backend's head reads, on device.

        weight  may lie in a mapped file: the result has its own memory
        bits    8 rounds each row to int8, and head() its input: near the same logits for half the
                bytes
        The result serves embed() too: a tied embedding is one matrix in memory.
        """
        ...

    def prepare_dense(self, weight: Tensor) -> object:
        """Return [out_features, in_features] as dense_linear reads it fastest, on device.

        weight  may lie in a mapped file
        """
        ...

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        """Return a model's layers in the form this backend's ternary_layers runs fastest."""
        ...

    def nbytes(self, prepared: object) -> int:
        """Return the bytes of memory a prepared weight holds; a TernaryHead is its weight's."""
        ...

    def embed(self, token_ids: Tensor, embedding: object) -> Tensor:
        """Return the tokens' rows, [T, hidden_size] in the embedding's dtype.

        token_ids  [T] int64
        embedding  [vocab_size, hidden_size] on device, what prepare_head made of it, or a
                   TernaryHead: code · scale, rounded once
        """
        ...

    def quantize(self, x: Tensor, *, group: int | None = None) -> QuantizedActivations:
        """Return x [T, K] quantized, rounding half to even: per token, or per group of K.

        group   of the weights that read it
        Raises  ShapeError if K isn't two or more groups, of a multiple of 64
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean x² + eps) · weight, per token, [T, K]."""
        ...

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, *, group: int | None = None
    ) -> QuantizedActivations:
        """Return quantize(rms_norm(x)) with no rounding in between, [T, K]."""
        ...

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return f(gate) · up for gate_up [T, 2 · F] = gate ‖ up; f is relu² or SiLU. [T, F]"""
        ...

    def gated_activation_quantize(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        *,
        group: int | None = None,
    ) -> QuantizedActivations:
        """Return f(gate) · up, RMS-normed by weight unless None, quantized; float32 throughout."""
        ...

    def ternary_linear(
        self, x: QuantizedActivations, weight: object, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return float32(x.codes · Wᵀ) / x.scales · weight scales (+ bias) (+ residual).

        Accumulates in int32 and rounds once to dtype: bitwise the same for every T. A group's sum
        is int32 too, and Σ float32(sum) · (1 / x.scale) · weight scale runs over the groups of a
        row in order, in float32 and with each product rounded: bitwise the same again.
        weight    what prepare_ternary returned
        x         quantized by the weight's group; ShapeError else
        residual  [T, out_features] in dtype, or None
        Returns   [T, out_features] dtype
        """
        ...

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        """Return the residual stream after the layers, as h; bit for bit what layer.py computes.

        h          [T, hidden_size]
        layers     what prepare_layers returned
        rope       as rope_and_cache takes it
        kv_caches  [num_layers, ...], a layer's as rope_and_cache takes it; the step's tokens are
                   written
        """
        ...

    def dense_layers(
        self,
        h: Tensor,
        layers: Sequence[LayerWeights[DenseLinear]],
        rope: Tensor,
        kv_caches: Tensor,
        layout: StepLayout,
    ) -> Tensor:
        """Return the residual stream after layers of dense linears, as h; see ternary_layers.

        layers  of matrices in h's dtype
        """
        ...

    def dense_linear(
        self, x: Tensor, weight: object, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Return x · weightᵀ (+ bias) (+ residual), the 16-bit baseline's matmul.

        x         [T, in_features], in weight's dtype
        weight    what prepare_dense returned, or [out_features, in_features] as it is
        residual  [T, out_features], or None
        """
        ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
        num_heads: int,
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, return the queries.

        Queries and keys are normed before where there are head_norms, with no rounding between.

        qkv       [T, (H + 2 · G) · D], queries ‖ keys ‖ values
        rope      [max_model_len, D] float32, cos ‖ sin of the D/2 frequencies; half-split pairs
        kv_cache  [2, num_blocks, G, BLOCK_SIZE, D], keys then values; or of int8, which
                  kv_blocks.py lays out, and for a GPU gpu/kv_codes.py
        Returns   [T, H, D]
        """
        ...

    def attention(
        self, queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float
    ) -> Tensor:
        """Return causal softmax(q · kᵀ · scale) · v over each sequence's cached tokens.

        Over a cache of int8 queries are quantized as its keys are, by token and head.

        queries  [T, H, D]; head h reads key-value head h // (H / G)
        Returns  [T, H · D]
        """
        ...

    def head(self, x: Tensor, weight: object) -> Tensor:
        """Return logits [T, vocab_size] float32 of x [T, hidden_size].

        weight  what prepare_head returned; or a TernaryHead, which reads x quantized by its groups
        """
        ...


@runtime_checkable
class MeasuresMemory(Protocol):
    """A backend that can time the memory it reads weights from."""

    def measure_read_bandwidth(
        self,
        num_bytes: int = 1 << 28,
        *,
        num_passes: int = 8,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Return the bytes a second its threads read from memory, in the best of the passes.

        num_bytes  far more than the caches hold; allocated, written and let go
        check      called every some milliseconds; what it raises ends the measurement
        """
        ...
