"""Writes a ternary model as a GGUF file, as llama.cpp reads it.

Source  github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py for the names of keys and tensors, and
        src/models for the architectures; github.com/ggml-org/ggml, src/ggml-quants.c for blocks
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.packing import TernaryWeight, unpack
from torch import Tensor

from bitwatt.checkpoints.checkpoint import Checkpoint
from bitwatt.checkpoints.gguf import GgufCheckpoint, stored_name
from bitwatt.checkpoints.gguf_config import ARCHITECTURES
from bitwatt.checkpoints.gguf_writer import GgufWriter, MetadataValue
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.errors import CheckpointError
from bitwatt.model.build import build_transformer
from bitwatt.model.config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeDivisors,
    YarnRopeScaling,
)
from bitwatt.model.families import yarn_attention_factor
from bitwatt.model.padding import padded
from bitwatt.model.rope import rope_divisors
from bitwatt.model.sizes_only import SizesOnly

__all__ = ["GgufTarget", "TextMetadata", "Written", "convert_to_gguf"]

GgufTarget = Literal["gguf-tq2_0", "gguf-q2_0"]


class TextMetadata(Protocol):
    """What returns the keys of the tokenizer; see text.gguf_vocabulary.gguf_text."""

    def __call__(
        self, *, vocab_size: int, bos: int | None, eos: Sequence[int]
    ) -> Mapping[str, MetadataValue]: ...


_MAX_ROUNDING = 2.0**-11  # of a float16 that has all its digits
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Block:
    """A block format of GGUF: neighbours in a row, which share a float16 scale."""

    name: str
    type_id: int
    weights: int
    pack: Callable[[Tensor, Tensor], Tensor]


def _q2_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Return blocks of [n, 64] codes of 0 to 2 and their scales' bytes, [n, 18] uint8."""
    quarters = codes.view(-1, 16, 4)
    return torch.cat([scales, _in_bytes(quarters, dim=2)], dim=1)


def _tq2_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Return blocks of [n, 256] codes of 0 to 2 and their scales' bytes, [n, 66] uint8."""
    halves = codes.view(-1, 2, 4, 32)
    return torch.cat([_in_bytes(halves, dim=2).flatten(1), scales], dim=1)


def _in_bytes(codes: Tensor, dim: int) -> Tensor:
    """Return four codes along dim in a byte, the first in its lowest bits."""
    first, second, third, fourth = codes.unbind(dim)
    return first | second << 2 | third << 4 | fourth << 6


_BLOCKS: Mapping[GgufTarget, _Block] = {
    "gguf-tq2_0": _Block("TQ2_0", 35, 256, _tq2_0),
    "gguf-q2_0": _Block("Q2_0", 42, 64, _q2_0),
}


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion wrote: the bytes of its tensors, and what isn't as it was."""

    num_bytes: int
    notices: list[str]


def convert_to_gguf(
    source: Path,
    destination: Path,
    target: GgufTarget,
    *,
    texts: TextMetadata,
    check_texts: Callable[[Path], None],
    quantize: bool = False,
) -> Written:
    """Write the ternary model at source to a new GGUF file, and compare that with the source.

    Codes stay what they are, and so do scales where float16 holds them; others are rounded to it,
    which a notice tells. Embedding and head are packed where the source's are ternary and blocks
    hold them, else they keep their values; norms and biases are float32.

    texts        returns the keys of the tokenizer
    check_texts  raises CheckpointError where a file's tokenizer isn't the source's
    quantize     ternarizes linears that are dense
    Raises       CheckpointError for what can't be read, or not be written so; nothing is left then
    """
    if destination.suffix != ".gguf":
        raise CheckpointError(f"{destination} is the name of no GGUF file: it ends in .gguf")
    partial = destination.with_name(f"{destination.stem}.partial.gguf")
    for path in (destination, partial):
        if path.exists():
            raise CheckpointError(f"{path} is there already; give another name, or remove it")
    checkpoint = open_checkpoint(source, quantize=quantize)
    if checkpoint.why_dense is not None:
        raise CheckpointError(
            f"{checkpoint.why_dense}; --to {target} writes ternary models, and --quantize makes "
            "one, at a loss of quality"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        with GgufWriter(destination.parent) as writer:
            copying = _Copying(checkpoint, _BLOCKS[target], writer)
            build_transformer(
                copying,
                weights="dense",  # which asks for every tensor in its own size
                backend=cast(Backend, SizesOnly("reference")),
                dtype=torch.bfloat16,
            )
            checkpoint.check_all_read()
            config = checkpoint.config
            if isinstance(config.rope_scaling, RopeDivisors | Llama3RopeScaling):
                copying.write(_ROPE_DIVISORS, rope_divisors(config))
            keys = texts(
                vocab_size=config.vocab_size, bos=config.bos_token_id, eos=config.eos_token_ids
            )
            num_bytes = writer.finish(partial, _metadata(config, source) | dict(keys))
        _compare(config, partial)
        check_texts(partial)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    return Written(num_bytes, copying.told())


class _NoBlocksError(CheckpointError):
    """A matrix that the format has no blocks for."""


class _Copying:
    """A TensorSource that writes each tensor it is asked for, and hands it out empty."""

    is_ternary = True

    def __init__(self, checkpoint: Checkpoint, block: _Block, writer: GgufWriter) -> None:
        self.config = checkpoint.config
        self.notices: list[str] = []
        self._checkpoint = checkpoint
        self._block = block
        self._writer = writer
        self._is_paired = ARCHITECTURES[_architecture(checkpoint.config)].has_paired_rope
        self._rounding = 0.0
        self._unpacked: list[str] = []

    def told(self) -> list[str]:
        """Return what isn't as it was."""
        rounded = [f"scales are rounded to float16, by up to {self._rounding:.2%}"]
        return self._unpacked + (rounded if self._rounding else [])

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        module = name.removesuffix(".weight")
        if len(shape) == 2 and self._checkpoint.stores_ternary(module):  # embedding or head
            try:
                self.ternary(module, *shape, fits=fits)
            except _NoBlocksError as error:
                self._unpacked.append(f"{error}: it is written as floats")
            else:
                return torch.empty(shape, dtype=fits, device="meta")
        tensor = self._checkpoint.dense(name, *shape, fits=torch.float32)  # of which none is lost
        self.write(stored_name(name), self._in_pairs(name, tensor))
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def write(self, stored: str, tensor: Tensor) -> None:
        """Write floats: a matrix as it is, a vector in float32, as llama.cpp wants it."""
        tensor = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
        self._add(stored, tensor.shape, _FLOATS[tensor.dtype], tensor)

    def stores_ternary(self, _name: str, /) -> bool:
        return False  # dense() asks for them

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        weight = self._checkpoint.ternary(name, out_features, in_features, fits=fits)
        block = self._block
        if in_features % block.weights:
            raise _NoBlocksError(
                f"{name} has rows of {in_features} weights, and {block.name} blocks of "
                f"{block.weights}" + (" (--to gguf-q2_0 has 64)" if block.weights != 64 else "")
            )
        codes = (unpack(weight.codes)[:, :in_features] + 1).to(torch.uint8)
        scales = self._half(name, self._by_block(name, weight.scales, in_features))
        rows = [
            self._in_pairs(f"{name}.weight", part).reshape(-1, width)
            for part, width in ((codes, block.weights), (scales.view(torch.uint8), 2))
        ]
        data = block.pack(*rows)
        self._add(stored_name(f"{name}.weight"), (out_features, in_features), block.type_id, data)
        empty = torch.empty(out_features, padded(in_features) // 4, dtype=torch.uint8)
        return TernaryWeight(empty.to("meta"), weight.scales.to("meta"))

    def _by_block(self, name: str, scales: Tensor, in_features: int) -> Tensor:
        """Return the scales of a row's blocks, [out_features, blocks]."""
        block, num_blocks = self._block, in_features // self._block.weights
        num_groups = 1 if scales.dim() == 1 else scales.shape[1]
        scales = scales.view(-1, num_groups)
        if num_blocks % num_groups == 0:
            return scales.repeat_interleave(num_blocks // num_groups, dim=1)
        shared = scales.view(len(scales), num_blocks, -1) if num_groups % num_blocks == 0 else None
        if shared is None or not bool((shared == shared[:, :, :1]).all()):
            raise _NoBlocksError(
                f"{name} has a scale to each {in_features // num_groups} weights, and {block.name} "
                f"one to {block.weights} (--to gguf-q2_0 has one to 64)"
            )
        return shared[:, :, 0]

    def _half(self, name: str, scales: Tensor) -> Tensor:
        halves = scales.half()
        rounding = float(((halves.float() - scales) / scales).abs().nan_to_num(0.0).max())
        if not rounding <= _MAX_ROUNDING:
            low, high = scales.abs().aminmax()
            raise _NoBlocksError(
                f"{name} has scales from {low:.3g} to {high:.3g}, and {self._block.name} float16 "
                "ones, from 6.1e-05 to 65504 (--to hf takes any)"
            )
        self._rounding = max(self._rounding, rounding)
        return halves.contiguous()

    def _in_pairs(self, name: str, rows: Tensor) -> Tensor:
        """Return rows of q and k as llama.cpp's rotation of neighbours wants them."""
        module = name.rpartition(".")[0]
        is_query = module.endswith(".q_proj")
        if not self._is_paired or not (is_query or module.endswith(".k_proj")):
            return rows
        num_heads = self.config.num_heads if is_query else self.config.num_kv_heads
        halves = rows.view(num_heads, 2, self.config.head_dim // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def _add(self, name: str, shape: tuple[int, ...], type_id: int, tensor: Tensor) -> None:
        data = tensor.contiguous().view(torch.uint8).flatten().numpy().data
        self._writer.add(name, shape, type_id, data)


def _architecture(config: ModelConfig) -> str:
    """Return general.architecture of the model."""
    if config.has_sub_norms:
        return "bitnet-b1.58" if config.activation == "relu2" else "bitnet"
    if config.has_head_norms:
        return "qwen3"
    return "qwen2" if config.has_qkv_bias and not config.has_o_bias else "llama"


def _metadata(config: ModelConfig, source: Path) -> dict[str, MetadataValue]:
    name = _architecture(config)
    keys: dict[str, MetadataValue] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_model_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    match config.rope_scaling:
        case LinearRopeScaling(factor):
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case YarnRopeScaling() as yarn:
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(yarn.factor),
                "rope.scaling.original_context_length": yarn.original_max_model_len,
                "rope.scaling.attn_factor": (
                    yarn.attention_factor / yarn_attention_factor(yarn.factor)
                ),
                "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
                "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
            }
    return {
        "general.architecture": name,
        "general.name": source.name.removesuffix(".gguf"),
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in keys.items()},
    }


def _compare(config: ModelConfig, written: Path) -> None:
    """Raise CheckpointError where the file doesn't say what the source's configuration does."""
    found = GgufCheckpoint(written).config
    expected = replace(
        config, architecture=found.architecture, rms_norm_eps=_single(config.rms_norm_eps)
    )
    if set(config.eos_token_ids) <= set(found.eos_token_ids):  # a file's end-of-turn tokens, too
        expected = replace(expected, eos_token_ids=found.eos_token_ids)
    if _turns_alike(config, found):
        expected = replace(expected, rope_scaling=found.rope_scaling, rope_theta=found.rope_theta)
    if expected != found:
        raise CheckpointError(f"no GGUF file can say all that this is: {config} is read as {found}")


def _turns_alike(one: ModelConfig, other: ModelConfig) -> bool:
    """Return whether the rotary tables are equal but for the rounding to float32."""
    factors, thetas = (
        [getattr(config.rope_scaling, "attention_factor", 1.0) for config in (one, other)],
        [_single(config.rope_theta) for config in (one, other)],
    )
    return (
        math.isclose(*factors, rel_tol=1e-6)
        and thetas[0] == thetas[1]
        and torch.allclose(rope_divisors(one), rope_divisors(other), rtol=1e-6, atol=0)
    )


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
