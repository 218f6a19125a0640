"""Hugging Face folders: dense LLaMA, packed BitNet, and the float masters of BitNet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitwatt_kernels.errors import KernelError
from bitwatt_kernels.packing import TernaryWeight, pack
from bitwatt_kernels.reference.linear import ternarize
from torch import Tensor

from bitwatt.checkpoints.bitnet_packing import unpack_bitnet
from bitwatt.checkpoints.safetensors import SafetensorsFolder, read_json
from bitwatt.errors import CheckpointError
from bitwatt.model.families import Family, family_of

__all__ = ["HuggingFaceCheckpoint"]


@dataclass(frozen=True, slots=True)
class _Quantization:
    """How the linears of the layers are ternary.

    is_online    float masters, ternarized as they are read; else ternary values and a scale
    is_inverse   W = t / weight_scale; else W = t · weight_scale
    """

    is_online: bool
    is_inverse: bool


class HuggingFaceCheckpoint:
    """A local folder with config.json and safetensors files; see TensorSource."""

    def __init__(self, path: Path) -> None:
        config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.notices: list[str] = []
        try:
            family = family_of(config)
            self.config = family.read_config(
                config, read_json(generation) if generation.exists() else None
            )
            self._quantization = _quantization(config, family)
        except CheckpointError as error:
            raise CheckpointError(f"{path / 'config.json'}: {error}") from error
        self.is_ternary = self._quantization is not None
        self._aliases = family.aliases
        self._tensors = SafetensorsFolder(path)
        self._unread = set(self._tensors)

    @staticmethod
    def recognizes(path: Path) -> bool:
        return (path / "config.json").exists() and SafetensorsFolder.is_in(path)

    def dense(self, name: str, /, *shape: int) -> Tensor:
        tensor = self._read(name)
        self._expect_float(name, tensor)
        if tuple(tensor.shape) != shape:
            raise self._error(name, f"has shape {list(tensor.shape)}; expected {list(shape)}")
        self._notice_if_zero(name, is_zero=not bool(tensor.any()))
        return tensor

    def ternary(self, name: str, /, out_features: int, in_features: int) -> TernaryWeight:
        quantization = self._quantization
        assert quantization is not None
        weight_name = f"{name}.weight"
        weight = self._read(weight_name)
        is_packed = weight.dtype == torch.uint8 and not quantization.is_online
        rows = out_features // 4 if is_packed else out_features
        if tuple(weight.shape) != (rows, in_features) or (is_packed and out_features % 4):
            expected = f"[{out_features}{' / 4' if is_packed else ''}, {in_features}]"
            raise self._error(weight_name, f"has shape {list(weight.shape)}; expected {expected}")
        if not is_packed:
            self._expect_float(weight_name, weight)
        if quantization.is_online:
            values, scale = ternarize(weight)
            if not bool(scale.isfinite()):
                raise self._error(weight_name, "has values that are not finite")
        else:
            unpack = self._unpack if is_packed else self._ternary_values
            values = unpack(weight_name, weight)
            scale = self._scale(f"{name}.weight_scale", is_inverse=quantization.is_inverse)
        self._notice_if_zero(weight_name, is_zero=not bool(values.any()))
        try:
            codes = pack(values)
        except KernelError as error:
            raise self._error(weight_name, str(error)) from error
        return TernaryWeight(codes, scale.expand(out_features).contiguous())

    def check_all_read(self) -> None:
        """Raise CheckpointError if the folder holds a tensor that the model has no place for."""
        spare = {"lm_head.weight"} if self.config.is_tied else set()
        extra = sorted(n for n in self._unread - spare if not n.endswith(".rotary_emb.inv_freq"))
        if extra:
            raise self._error(extra[0], f"has no place in this model (and {len(extra) - 1} others)")

    def _stored(self, name: str) -> str:
        """Return the name the folder knows the tensor by."""
        alias = name
        for ours, theirs in self._aliases.items():
            alias = alias.replace(ours, theirs)
        return alias if name not in self._tensors and alias in self._tensors else name

    def _read(self, name: str) -> Tensor:
        stored = self._stored(name)
        self._unread.discard(stored)
        return self._tensors.read(stored)

    def _scale(self, name: str, *, is_inverse: bool) -> Tensor:
        stored = self._read(name)
        self._expect_float(name, stored)
        scale = stored.float()
        if is_inverse:
            scale = 1.0 / scale
        if scale.numel() != 1 or not bool(scale.isfinite().all()) or not bool(scale.all()):
            raise self._error(
                name, f"is {stored.flatten()[:4].tolist()}; expected one finite number but 0"
            )
        return scale.flatten()

    def _unpack(self, name: str, packed: Tensor) -> Tensor:
        try:
            return unpack_bitnet(packed)
        except ValueError as error:
            raise self._error(name, str(error)) from error

    def _ternary_values(self, name: str, weight: Tensor) -> Tensor:
        values = weight.clamp(-1, 1).to(torch.int8)
        if not torch.equal(values.to(weight.dtype), weight):
            raise self._error(name, "has values besides -1, 0 and 1, but comes with a weight_scale")
        return values

    def _expect_float(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise self._error(name, f"is {tensor.dtype}; expected a 16- or 32-bit float")

    def _notice_if_zero(self, name: str, *, is_zero: bool) -> None:
        if is_zero:
            file = self._tensors.path(self._stored(name))
            self.notices.append(f"{file}: tensor {name!r} is all zeros")

    def _error(self, name: str, reason: str) -> CheckpointError:
        stored = self._stored(name)
        return CheckpointError(f"{self._tensors.path(stored)}: tensor {stored!r} {reason}")


def _quantization(config: Mapping[str, Any], family: Family) -> _Quantization | None:
    """Return how a config.json says its linears are ternary, or None where they are dense."""
    quantization = config.get("quantization_config")
    if quantization is None:
        if family.has_ternary_masters:
            return _Quantization(is_online=True, is_inverse=False)
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config is {quantization!r}; expected an object")
    if quantization.get("quant_method") != "bitnet":
        raise CheckpointError(
            f"quant_method {quantization.get('quant_method')!r} is not supported; bitnet is"
        )
    kept = quantization.get("modules_to_not_convert") or ["lm_head"]
    if kept != ["lm_head"]:
        raise CheckpointError(f"not supported: modules_to_not_convert={kept!r}")
    if quantization.get("use_rms_norm"):
        raise CheckpointError("not supported: use_rms_norm, a norm before each linear")
    linear_class = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    match linear_class, mode:
        case "autobitlinear", "online":
            return _Quantization(is_online=True, is_inverse=False)
        case "autobitlinear", "offline":
            return _Quantization(is_online=False, is_inverse=False)
        case "bitlinear", _:  # which has but one mode and ignores the field
            return _Quantization(is_online=False, is_inverse=True)
        case _:
            raise CheckpointError(
                f"not supported: linear_class={linear_class!r} with quantization_mode={mode!r}"
            )
