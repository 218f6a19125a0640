"""GGUF files: dense LLaMA, and BitNet and LLaMA with ternary linears."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from bitwatt_kernels.packing import TernaryWeight
from torch import Tensor

from bitwatt.checkpoints.exact import EXACT_FLOATS, NOT_EXACT, looks_ternary, pack_exactly
from bitwatt.checkpoints.gguf_blocks import (
    STORED_FLOATS,
    TERNARY_FORMATS,
    decode_floats,
    decode_groups,
)
from bitwatt.checkpoints.gguf_config import architecture_of, read_config
from bitwatt.checkpoints.gguf_file import GgufTensor, is_gguf, open_gguf
from bitwatt.checkpoints.groups import largest_sums, pack_groups
from bitwatt.errors import CheckpointError, shorten
from bitwatt.model.config import RopeDivisors

__all__ = ["GgufCheckpoint", "stored_name"]

T = TypeVar("T")

_ZEROS = 0b01010101  # four of a packed matrix
_EMBEDDING, _HEAD, _ROPE_DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
_LINEARS = [name for name in _NAMES if name.endswith("_proj")]


class GgufCheckpoint:
    """A GGUF file, or the first of several that one was split into; see TensorSource.

    Linears are ternary where all of them are stored as such, with scales to rows or to groups.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = gguf = open_gguf(path)
        self.notices: list[str] = []
        self._unread = set(gguf.tensors)
        self._is_paired = architecture_of(gguf).has_paired_rope
        if _EMBEDDING not in gguf.tensors:
            raise CheckpointError(f"{path} has no tensor {_EMBEDDING!r}")
        vocab_size = gguf.tensors[_EMBEDDING].shape[0]
        self.config = read_config(gguf, vocab_size=vocab_size, is_tied=_HEAD not in gguf.tensors)
        if self.config.num_layers > len(gguf.tensors):
            raise CheckpointError(
                f"{path}: block_count is {self.config.num_layers}; "
                f"the file holds {len(gguf.tensors)} tensors"
            )
        self._find_biases()
        if _ROPE_DIVISORS in gguf.tensors:
            if self.config.rope_scaling is not None:
                raise CheckpointError(
                    f"{path}: not supported: {_ROPE_DIVISORS!r} beside rope.scaling.type"
                )
            divisors = self.dense(_ROPE_DIVISORS, self.config.head_dim // 2, fits=torch.float32)
            scaling = RopeDivisors(tuple(divisors.tolist()))
            self.config = replace(self.config, rope_scaling=scaling)
        self.why_dense = self._find_why_dense()
        formats = dict.fromkeys(tensor.layout.name for tensor in self._linears())
        self.is_ternary = self.why_dense is None and TERNARY_FORMATS.issuperset(formats)
        self.stored_as = " and ".join(formats)
        if self.why_dense is None:
            self.stored_as += "; W = t · scale" if self.is_ternary else f", {EXACT_FLOATS}"

    @staticmethod
    def recognizes(path: Path) -> bool:
        return is_gguf(path)

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        tensor = self._take(name, shape)
        weight = torch.empty(0)
        done, is_zero = 0, True
        for rows in self._decoded(tensor, decode_floats):
            low, high = rows.aminmax()
            self._check_range(tensor, low, high, fits)
            is_zero &= not (low or high)
            if rows.numel() == prod(shape):
                weight = rows
                break
            if not done:
                weight = torch.empty(shape[0], rows.shape[1], dtype=fits)
            weight[done : done + len(rows)] = rows
            done += len(rows)
        self._notice_if_zero(tensor, is_zero=is_zero)
        return self._in_order(name, weight.view(shape))

    def stores_ternary(self, name: str, /) -> bool:
        tensor = self._gguf.tensors.get(stored_name(f"{name}.weight"))
        if tensor is None or self.why_dense is not None:
            return False
        if tensor.layout.name in STORED_FLOATS:
            return looks_ternary(self._floats(tensor)) is True
        return tensor.layout.name in TERNARY_FORMATS

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        name += ".weight"
        tensor = self._take(name, (out_features, in_features))
        try:
            if tensor.layout.name in TERNARY_FORMATS:
                parts = self._decoded(tensor, decode_groups)
                weight = pack_groups(parts, out_features, in_features)
            else:
                weight = self._packed_floats(tensor)
        except ValueError as error:
            raise self._error(tensor, str(error)) from error
        self._check_range(tensor, *largest_sums(weight, in_features).aminmax(), fits)
        zeros = weight.codes == _ZEROS
        self._notice_if_zero(tensor, is_zero=bool(zeros.all()))
        return TernaryWeight(
            self._in_order(name, weight.codes), self._in_order(name, weight.scales)
        )

    def check_all_read(self) -> None:
        """Raise CheckpointError if the file holds a tensor that the model has no place for."""
        extra = sorted(self._unread)
        if extra:
            raise self._error(
                self._gguf.tensors[extra[0]],
                f"has no place in this model (and {len(extra) - 1} others)",
            )

    def _find_biases(self) -> None:
        """Add to the config which linears have a bias: a file says it by having them."""
        first = {
            name for name in _LINEARS if stored_name(f"model.layers.0.{name}.bias") in self._unread
        }
        self.config = replace(
            self.config,
            has_qkv_bias=self.config.has_qkv_bias or "self_attn.q_proj" in first,
            has_o_bias="self_attn.o_proj" in first,
            has_mlp_bias="mlp.up_proj" in first,
        )

    def _linears(self) -> list[GgufTensor]:
        names = (
            stored_name(f"model.layers.{layer}.{linear}.weight")
            for layer in range(self.config.num_layers)
            for linear in _LINEARS
        )
        return [self._gguf.tensors[name] for name in names if name in self._gguf.tensors]

    def _find_why_dense(self) -> str | None:
        """Return why the linears aren't served as ternary ones; None where they are."""
        linears = self._linears()
        dense = [tensor for tensor in linears if tensor.layout.name not in TERNARY_FORMATS]
        if self._look_ternary(dense):
            return None
        if dense:
            are = f"the linears are {dense[0].layout.name}"
            if len(dense) < len(linears):
                are = f"tensor {shorten(dense[0].name)} is {dense[0].layout.name}"
            return f"{self._gguf.path}: {are}, not ternary: serve them as dense (--weights dense)"
        return None

    def _look_ternary(self, linears: list[GgufTensor]) -> bool:
        """Return whether linears that are floats look exactly ternary, all of them."""
        if any(tensor.layout.name not in STORED_FLOATS for tensor in linears):
            return False
        return {looks_ternary(self._floats(tensor)) for tensor in linears} - {None} == {True}

    def _floats(self, tensor: GgufTensor) -> Tensor:
        [rows] = self._decoded(tensor, decode_floats)  # of such a type all at once
        return rows

    def _packed_floats(self, tensor: GgufTensor) -> TernaryWeight:
        weight = pack_exactly(self._floats(tensor))
        if weight is None:
            raise self._error(tensor, NOT_EXACT)
        return weight

    def _take(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """Return the tensor of that name among ours, which then counts as read."""
        stored = stored_name(name)
        if stored not in self._gguf.tensors:
            raise CheckpointError(f"{self._gguf.path} has no tensor {shorten(stored)}")
        self._unread.discard(stored)
        tensor = self._gguf.tensors[stored]
        if tensor.shape != shape:
            raise self._error(tensor, f"has shape {list(tensor.shape)}; expected {list(shape)}")
        return tensor

    def _decoded(
        self, tensor: GgufTensor, decode: Callable[[GgufTensor, memoryview], Iterator[T]]
    ) -> Iterator[T]:
        try:
            yield from decode(tensor, self._gguf.data(tensor.name))
        except ValueError as error:
            raise self._error(tensor, str(error)) from error

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a matrix as Hugging Face's rotation of halves wants them."""
        module = name.rpartition(".")[0]
        is_query = module.endswith(".q_proj")
        if not self._is_paired or not (is_query or module.endswith(".k_proj")):
            return rows
        num_heads = self.config.num_heads if is_query else self.config.num_kv_heads
        by_pair = rows.view(num_heads, self.config.head_dim // 2, 2, *rows.shape[1:])
        return by_pair.transpose(1, 2).reshape(rows.shape)

    def _check_range(
        self, tensor: GgufTensor, low: Tensor, high: Tensor, fits: torch.dtype
    ) -> None:
        if not (low.isfinite() and high.isfinite()):  # a NaN is both
            raise self._error(tensor, "has values that are not finite")
        if not (low.to(fits).isfinite() and high.to(fits).isfinite()):
            raise self._error(
                tensor, f"has values or sums from {low:.3g} to {high:.3g}, too large for {fits}"
            )

    def _notice_if_zero(self, tensor: GgufTensor, *, is_zero: bool) -> None:
        if is_zero:
            self.notices.append(str(self._error(tensor, "is all zeros")))

    def _error(self, tensor: GgufTensor, reason: str) -> CheckpointError:
        file = self._gguf.file_of(tensor.name)
        return CheckpointError(f"{file}: tensor {shorten(tensor.name)} {reason}")


def stored_name(name: str) -> str:
    """Return GGUF's name of a tensor."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    module, dot, kind = (layer[2] if layer else name).rpartition(".")
    stored = f"{_NAMES.get(module, module)}{dot}{kind}"
    return f"blk.{layer[1]}.{stored}" if layer else stored
