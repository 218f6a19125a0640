"""Builds a transformer from whatever holds its tensors."""

import ctypes
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar, get_args

import torch
from bitwatt_kernels.backend import (
    Backend,
    DenseLinear,
    HeadNorms,
    LayerWeights,
    NormedParts,
    TernaryHead,
)
from bitwatt_kernels.packing import TernaryWeight, concatenate_rows, times_scales, unpack
from torch import Tensor

from bitwatt.errors import CheckpointError, ConfigurationError
from bitwatt.model.config import HeadBits, ModelConfig, Weights
from bitwatt.model.padding import PaddedSource, padded
from bitwatt.model.rope import rope_table
from bitwatt.model.tensor_source import TensorSource
from bitwatt.model.transformer import ModelMemory, RunLayers, Transformer

__all__ = ["build_transformer"]

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"

# Of a context that no one has asked for: 131,072 tokens of heads of 128.
_MAX_ROPE_BYTES = 64 << 20

W = TypeVar("W")
# Matrices to be made one, rows after rows: name, out_features and in_features of each.
_Parts = list[tuple[str, int, int]]


def build_transformer(
    source: TensorSource,
    *,
    weights: Weights,
    backend: Backend,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    head_bits: HeadBits = 16,
) -> Transformer:
    """Return the source's model on the backend's device, tensors read once and in order.

    weights        "dense" makes ternary linears dense, in dtype; "ternary" wants a ternary source
    max_model_len  lowers the model's own
    head_bits      8 rounds the head, and with it a tied embedding, to int8: logits move a little;
                   among ternary weights one that is ternary stays so
    Raises         ConfigurationError, or CheckpointError where the source can't be served so
    """
    config = source.config
    if head_bits not in get_args(HeadBits):
        raise ConfigurationError(f"head_bits is {head_bits}; it must be 8 or 16 (--head-bits)")
    if weights == "dense" and dtype == torch.float16 and config.activation == "relu2":
        raise CheckpointError(
            "relu² passes float16's largest value, 65504: serve this model in bfloat16 (--dtype)"
        )
    if max_model_len is not None:
        if not 2 <= max_model_len <= config.max_model_len:
            raise ConfigurationError(
                f"max_model_len is {max_model_len}; the model takes 2 to {config.max_model_len} "
                "(--max-model-len)"
            )
        config = replace(config, max_model_len=max_model_len)
    elif (longest := max(2, _MAX_ROPE_BYTES // (4 * config.head_dim))) < config.max_model_len:
        source.notices.append(
            f"the context is {longest} tokens of the model's {config.max_model_len}, so that the "
            f"rotary table takes {_MAX_ROPE_BYTES >> 20} MiB (--max-model-len sets another)"
        )
        config = replace(config, max_model_len=longest)
    if weights == "ternary":
        source, config = _filled(source, config)
    with torch.inference_mode():
        model = _Builder(source, config, weights, backend, dtype).build(head_bits=head_bits)
    _return_freed_memory()
    return model


def _filled(source: TensorSource, config: ModelConfig) -> tuple[TensorSource, ModelConfig]:
    """Return them with rows of 64 weights; CheckpointError where zeros can't fill them."""
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("num_attention_heads · head_dim", config.num_heads * config.head_dim),
    ):
        if padded(size) != size:
            raise CheckpointError(
                f"{name} is {size}; ternary linears take multiples of {padded(1)} "
                "(--weights dense takes any)"
            )
    width = padded(config.intermediate_size)
    if width == config.intermediate_size:
        return source, config
    return PaddedSource(source), replace(config, intermediate_size=width)


def _return_freed_memory() -> None:
    """Give the system what loading has freed: of a 2B4T checkpoint 0.4 GB beside its 1.2.

    glibc keeps it otherwise, spread between what stays; other libraries have no such call.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class _Builder:
    """Reads the tensors one by one and counts what they take."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        weights: Weights,
        backend: Backend,
        dtype: torch.dtype,
    ) -> None:
        self.source = source
        self.config = config
        self.weights = weights
        self.backend = backend
        self.dtype = dtype
        self.vocabulary = (config.vocab_size, config.hidden_size)
        self.packed_bytes = 0
        self.other_bytes = 0
        self.linear_bytes = 0
        self.num_parameters = 0
        num_added = config.intermediate_size - source.config.intermediate_size
        by_layer = 3 * config.hidden_size + config.has_sub_norms + 2 * config.has_mlp_bias
        by_layer += config.linear_norm_eps is not None
        self.num_padded = config.num_layers * num_added * by_layer  # zeros that are no parameters

    def build(self, *, head_bits: HeadBits) -> Transformer:
        config = self.config
        # A tied head and the embedding are one matrix in memory, of 8 bits or ternary too.
        head = self.head(_EMBEDDING, head_bits) if config.is_tied else None
        embedding = self.embedding() if head is None else head
        run_layers = self.layers(f"model.layers.{i}" for i in range(config.num_layers))
        norm = self.norm("model.norm", config.hidden_size)
        if head is None:
            head = self.head(_HEAD, head_bits)
        self.num_parameters += math.prod(self.vocabulary) * (1 if config.is_tied else 2)
        embedding_bytes = self.backend.nbytes(embedding)
        if head is not embedding:
            embedding_bytes += self.backend.nbytes(head)
        rope = rope_table(config, self.backend.device)
        return Transformer(
            config,
            self.backend,
            self.dtype,
            embedding=embedding,
            run_layers=run_layers,
            norm=norm,
            head=head,
            rope=rope,
            memory=ModelMemory(
                packed_weights_bytes=self.packed_bytes,
                embedding_bytes=embedding_bytes,
                other_weights_bytes=self.other_bytes + rope.nbytes,
                linear_bytes=self.linear_bytes,
                step_bytes=self.packed_bytes + self.other_bytes + self.backend.nbytes(head),
                num_parameters=self.num_parameters - self.num_padded,
            ),
            notices=self.source.notices,
        )

    def layers(self, names: Iterable[str]) -> RunLayers:
        backend = self.backend
        if self.weights == "ternary":
            ternary = backend.prepare_layers([self.layer(name, self.ternary) for name in names])
            return lambda h, rope, kv_caches, layout: backend.ternary_layers(
                h, ternary, rope, kv_caches, layout
            )
        dense = tuple(self.layer(name, self.dense) for name in names)
        return lambda h, rope, kv_caches, layout: backend.dense_layers(
            h, dense, rope, kv_caches, layout
        )

    def layer(self, name: str, prepare: Callable[[_Parts, bool], W]) -> LayerWeights[W]:
        """Return a layer whose matrices prepare() has prepared."""
        _return_freed_memory()  # of the layer before; all of them came to a third of a dense model
        config = self.config
        eps = config.linear_norm_eps

        def linear(parts: _Parts, has_bias: bool) -> W | NormedParts[W]:
            if eps is None:
                return prepare(parts, has_bias)
            norms = tuple(self.norm(f"{name}.rms_norm", columns) for name, _, columns in parts)
            return NormedParts(norms, tuple(prepare([part], has_bias) for part in parts), eps)

        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        has_sub_norms = config.has_sub_norms
        return LayerWeights(
            num_heads=config.num_heads,
            attention_scale=config.head_dim**-0.5,
            activation=config.activation,
            eps=config.rms_norm_eps,
            input_norm=self.norm(f"{name}.input_layernorm", hidden),
            qkv=linear(
                [
                    (f"{attention}.q_proj", queries, hidden),
                    (f"{attention}.k_proj", keys, hidden),
                    (f"{attention}.v_proj", keys, hidden),
                ],
                config.has_qkv_bias,
            ),
            head_norms=self.head_norms(attention) if config.has_head_norms else None,
            attention_sub_norm=(
                self.norm(f"{attention}.attn_sub_norm", queries) if has_sub_norms else None
            ),
            o=linear([(f"{attention}.o_proj", hidden, queries)], config.has_o_bias),
            mlp_norm=self.norm(f"{name}.post_attention_layernorm", hidden),
            gate_up=linear(
                [(f"{mlp}.gate_proj", inner, hidden), (f"{mlp}.up_proj", inner, hidden)],
                config.has_mlp_bias,
            ),
            mlp_sub_norm=self.norm(f"{mlp}.ffn_sub_norm", inner) if has_sub_norms else None,
            down=linear([(f"{mlp}.down_proj", hidden, inner)], config.has_mlp_bias),
        )

    def to_device(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy: a view of a file would fail, or change, with the file."""
        return tensor.to(self.backend.device, dtype, copy=True).contiguous()

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        return self.to_device(self.source.dense(name, rows, columns, fits=self.dtype), self.dtype)

    def embedding(self) -> object:
        if self.stores_ternary(_EMBEDDING):
            return self.ternary_head(_EMBEDDING)
        return self.matrix(f"{_EMBEDDING}.weight", *self.vocabulary)

    def head(self, name: str, bits: HeadBits) -> object:
        if self.stores_ternary(name):
            if bits == 8:
                self.source.notices.append("head_bits 8 changes nothing: the head is ternary")
            return self.ternary_head(name)
        weight = self.source.dense(f"{name}.weight", *self.vocabulary, fits=self.dtype)
        return self.backend.prepare_head(weight.to(self.dtype), bits=bits)

    def stores_ternary(self, name: str) -> bool:
        return self.weights == "ternary" and self.source.stores_ternary(name)

    def ternary_head(self, name: str) -> TernaryHead[object]:
        weight = self.source.ternary(name, *self.vocabulary, fits=self.dtype)
        return TernaryHead(self.backend.prepare_ternary(weight), self.dtype)

    def norm(self, name: str, size: int) -> Tensor:
        """Return a norm's weight in float32: it costs nothing and is what norms compute in."""
        self.num_parameters += size
        weight = self.source.dense(f"{name}.weight", size, fits=torch.float32)
        weight = self.to_device(weight, torch.float32)
        self.other_bytes += weight.nbytes
        return weight

    def head_norms(self, attention: str) -> HeadNorms:
        queries, keys = (
            self.norm(f"{attention}.{name}", self.config.head_dim) for name in ("q_norm", "k_norm")
        )
        return HeadNorms(queries, keys, self.config.rms_norm_eps)

    def bias(self, parts: _Parts, *, fits: torch.dtype) -> Tensor:
        """Return the biases of the parts, one after the other, as the source has them."""
        biases = [self.source.dense(f"{name}.bias", rows, fits=fits) for name, rows, _ in parts]
        self.num_parameters += sum(map(len, biases))
        return concatenate_rows(biases)

    def packed(self, parts: _Parts) -> TernaryWeight:
        weight = TernaryWeight.concatenate(
            [self.source.ternary(*part, fits=self.dtype) for part in parts]
        )
        self.num_parameters += sum(rows * columns for _, rows, columns in parts)
        return weight

    def ternary(self, parts: _Parts, has_bias: bool) -> object:
        weight = self.packed(parts)
        if has_bias:
            weight = replace(weight, bias=self.bias(parts, fits=torch.float32).float())
        prepared = self.backend.prepare_ternary(weight)
        num_bytes = self.backend.nbytes(prepared)
        self.packed_bytes += num_bytes
        self.linear_bytes += num_bytes
        return prepared

    def dequantized(self, packed: TernaryWeight, in_features: int) -> Tensor:
        """Return the first in_features columns as floats; of sizes alone, their size."""
        if packed.codes.is_meta:  # arithmetic on it would import torch's compiler
            return packed.codes.new_empty(packed.out_features, in_features, dtype=self.dtype)
        device = self.backend.device
        values = unpack(packed.codes.to(device))[:, :in_features]
        return times_scales(values.to(self.dtype), packed.scales.to(device, self.dtype))

    def dense(self, parts: _Parts, has_bias: bool) -> DenseLinear:
        if self.source.is_ternary:
            weight = self.dequantized(self.packed(parts), parts[0][2])
        else:
            weight = concatenate_rows(
                [self.matrix(f"{name}.weight", *shape) for name, *shape in parts]
            )
            self.num_parameters += weight.numel()
        prepared = self.backend.prepare_dense(weight)
        num_bytes = self.backend.nbytes(prepared)
        self.other_bytes += num_bytes
        self.linear_bytes += num_bytes
        if not has_bias:
            return DenseLinear(prepared)
        bias = self.to_device(self.bias(parts, fits=self.dtype), self.dtype)
        self.other_bytes += bias.nbytes
        return DenseLinear(prepared, bias)
