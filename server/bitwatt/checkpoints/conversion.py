"""Writes what any checkpoint holds as a Hugging Face folder, ternary or in 16 bits.

As a GGUF file gguf_export.py writes it.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.packing import TernaryWeight, times_scales, unpack
from safetensors.torch import save_file
from torch import Tensor

from bitwatt.checkpoints.bitnet_packing import pack_bitnet
from bitwatt.checkpoints.checkpoint import Checkpoint
from bitwatt.checkpoints.gguf_export import GgufTarget, convert_to_gguf
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
from bitwatt.model.padding import padded
from bitwatt.model.sizes_only import SizesOnly

__all__ = ["GgufTarget", "Target", "convert", "convert_to_gguf"]

Target = Literal["hf", "bf16"]
"""Ternary linears as packed codes and a scale; or dense ones in bfloat16, as the cost twin has."""

_MAX_SHARD_BYTES = 2 << 30  # of memory, too: a shard is written at once
_TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_OTHER_TEMPLATES = "additional_chat_templates"


def convert(
    source: Path,
    destination: Path,
    target: Target,
    write_texts: Callable[[Path], None] | None = None,
    *,
    quantize: bool = False,
) -> int:
    """Write the model at source to a new folder; return the bytes of its tensors.

    Codes and scales stay what they are, bit for bit; in bfloat16 a linear is what `--weights dense`
    makes of it in that dtype. Embedding and head are rounded for "bf16" alone, norms never.

    write_texts  writes the tokenizer to a folder, where source is none to copy it from
    quantize     ternarizes linears that are dense
    Raises       CheckpointError for what can't be read, or not be written so; nothing is left then
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is there already; give another, or remove it")
    partial = destination.with_name(f"{destination.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(
            f"{partial} is there already, of a conversion that runs or was broken off; remove it"
        ) from None
    try:
        num_bytes = _write(open_checkpoint(source, quantize=quantize), partial, target)
        if write_texts is None:
            _copy_texts(source, partial)
        else:
            write_texts(partial)
        _compare(source, partial)
        partial.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _write(checkpoint: Checkpoint, folder: Path, target: Target) -> int:
    if target == "bf16" and checkpoint.config.linear_norm_eps is not None:
        raise CheckpointError(
            "each linear has a norm of its own before it, which no config.json of dense linears "
            "says (--to hf keeps it)"
        )
    shards = _Shards(folder)
    build_transformer(
        _Copying(checkpoint, target, shards),
        weights="dense",  # which asks for every tensor in its own size
        backend=cast(Backend, SizesOnly("reference")),
        dtype=torch.bfloat16,
    )
    checkpoint.check_all_read()
    num_bytes = shards.finish()
    config = _config(checkpoint.config)
    if target == "hf" and checkpoint.why_dense is None:
        config["quantization_config"] = {
            "linear_class": "autobitlinear",
            "quant_method": "bitnet",
            "quantization_mode": "offline",
        }
        if checkpoint.config.linear_norm_eps is not None:
            config["quantization_config"] |= {
                "rms_norm_eps": checkpoint.config.linear_norm_eps,
                "use_rms_norm": True,
            }
    _write_json(folder / "config.json", config)
    return num_bytes


class _Copying:
    """A TensorSource that writes each tensor it is asked for, and hands it out empty."""

    def __init__(self, checkpoint: Checkpoint, target: Target, shards: "_Shards") -> None:
        self.config = checkpoint.config
        self.is_ternary = checkpoint.why_dense is None
        self.notices: list[str] = []
        self._checkpoint = checkpoint
        self._is_packed = target == "hf"
        self._shards = shards

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        wanted = torch.float32 if self._is_packed else fits  # of which none is lost
        tensor = self._checkpoint.dense(name, *shape, fits=wanted)
        is_rounded = not self._is_packed and len(shape) > 1
        self._shards.add(name, tensor.bfloat16() if is_rounded else tensor)
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def stores_ternary(self, _name: str, /) -> bool:
        return False  # no folder has a field that says so: they are written as floats

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        weight = self._checkpoint.ternary(name, out_features, in_features, fits=fits)
        values = unpack(weight.codes)[:, :in_features]
        if not self._is_packed:
            scales = weight.scales.bfloat16()
            self._shards.add(f"{name}.weight", times_scales(values.bfloat16(), scales))
        else:
            lowest, highest = weight.scales.aminmax()
            if lowest != highest:
                raise CheckpointError(
                    f"{name} has scales from {lowest:.3g} to {highest:.3g}, and the packed format "
                    "one a matrix (--to bf16 takes any)"
                )
            fills_bytes = out_features % 4 == 0
            packed = pack_bitnet(values) if fills_bytes else values.bfloat16()
            self._shards.add(f"{name}.weight", packed)
            self._shards.add(f"{name}.weight_scale", weight.scales[:1])
        codes = torch.empty(
            out_features, padded(in_features) // 4, dtype=torch.uint8, device="meta"
        )
        return TernaryWeight(codes, weight.scales.to("meta"))


class _Shards:
    """Safetensors files that are written as they fill, and the index that names them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names by file
        self._num_waiting_bytes = 0
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._num_waiting_bytes + tensor.nbytes > _MAX_SHARD_BYTES:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._num_waiting_bytes += tensor.nbytes
        self._num_bytes += tensor.nbytes

    def finish(self) -> int:
        """Write what waits, give the files their names; return the bytes of all tensors."""
        self._flush()
        if len(self._files) == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return self._num_bytes
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            name = f"model-{number + 1:05}-of-{len(self._files):05}.safetensors"
            self._path(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        _write_json(
            self._folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map},
        )
        return self._num_bytes

    def _flush(self) -> None:
        save_file(self._tensors, self._path(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors = {}
        self._num_waiting_bytes = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.partial"


def _config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json of the model: BitNet with sub-norms, Qwen with what it has, else LLaMA."""
    if config.has_sub_norms:
        name, model_type = "BitNetForCausalLM", "bitnet"
    elif config.has_head_norms:
        name, model_type = "Qwen3ForCausalLM", "qwen3"
    elif config.has_qkv_bias and not config.has_o_bias:
        name, model_type = "Qwen2ForCausalLM", "qwen2"
    else:
        name, model_type = "LlamaForCausalLM", "llama"
    eos = config.eos_token_ids
    written: dict[str, Any] = {
        "architectures": [name],
        "attention_bias": config.has_o_bias,
        "bos_token_id": config.bos_token_id,
        "dtype": "bfloat16",
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_model_len,
        "mlp_bias": config.has_mlp_bias,
        "model_type": model_type,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.is_tied,
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling
    match scaling:
        case RopeDivisors():
            raise CheckpointError(
                "rotary frequencies are divided each by a number of its own, "
                "which no config.json says"
            )
        case LinearRopeScaling():
            written["rope_scaling"] = {"factor": scaling.factor, "rope_type": "linear"}
        case Llama3RopeScaling():
            written["rope_scaling"] = {
                "factor": scaling.factor,
                "high_freq_factor": scaling.high_freq_factor,
                "low_freq_factor": scaling.low_freq_factor,
                "original_max_position_embeddings": scaling.original_max_model_len,
                "rope_type": "llama3",
            }
        case YarnRopeScaling():
            written["rope_scaling"] = {
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_model_len,
                "rope_type": "yarn",
                "truncate": scaling.truncates,
            }
    return written


def _copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer and what is beside it: what links lead to, not the links."""
    for name in _TEXTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in sorted((source / _OTHER_TEMPLATES).glob("*.jinja")):
        (folder / _OTHER_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / _OTHER_TEMPLATES / path.name)


def _compare(source: Path, folder: Path) -> None:
    """Raise CheckpointError where the folder's config.json doesn't say what the source's does."""
    before, after = open_checkpoint(source).config, open_checkpoint(folder).config
    if replace(before, architecture=after.architecture) != after:
        raise CheckpointError(
            f"{source}: a folder of {after.architecture} can't say all that {before.architecture} "
            f"is: {before} would be read as {after}"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
