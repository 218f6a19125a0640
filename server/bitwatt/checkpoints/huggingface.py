"""Hugging Face folders: dense LLaMA, packed BitNet, and the float masters of BitNet."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bitwatt_kernels.errors import KernelError
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight, pack
from bitwatt_kernels.reference.linear import ternarize
from torch import Tensor

from bitwatt.checkpoints.bitnet_packing import unpack_bitnet
from bitwatt.checkpoints.exact import EXACT_FLOATS, NOT_EXACT, looks_ternary, pack_exactly
from bitwatt.checkpoints.files import is_there, read_json
from bitwatt.checkpoints.groups import FLOATS, largest_sums, pack_groups, why_not_by_group
from bitwatt.checkpoints.mlx import MlxTensors, check_quantization
from bitwatt.checkpoints.safetensors import SafetensorsFolder
from bitwatt.errors import CheckpointError, shorten
from bitwatt.model.families import Family, family_of, notices_of, with_generation_config

__all__ = ["HuggingFaceCheckpoint"]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_WHY_DENSE = (
    "the linears are dense, not ternary: serve them so (--weights dense), or give one "
    "trained as BitNet b1.58; float masters of such a one are ternarized where config.json has a "
    "quantization_config that says so"
)
_LINEAR_NORM_EPS = 1e-6  # transformers', where the field is missing

# What transformers lists as not converted, and what of it is no linear anyway.
_KEPT = {"lm_head"}
_NO_LINEARS = {"embed_tokens", "model.embed_tokens", "norm", "model.norm"}


@dataclass(frozen=True, slots=True)
class _Quantization:
    """How the linears of the layers are ternary.

    is_online    float masters, ternarized as they are read; else ternary values and a scale
    is_inverse   W = t / weight_scale; else W = t · weight_scale
    norm_eps     of an RMSNorm of each linear's own before it; None where there is none
    """

    is_online: bool
    is_inverse: bool
    norm_eps: float | None = None

    def __str__(self) -> str:
        if self.is_online:
            return "float masters, ternarized by their mean magnitude"
        return f"ternary values; W = t {'/' if self.is_inverse else '·'} weight_scale"


class HuggingFaceCheckpoint:
    """A local folder with config.json and safetensors files; see TensorSource."""

    def __init__(self, path: Path) -> None:
        config_path = path / "config.json"
        config = read_json(config_path)
        try:
            family = family_of(config)
            self.config = family.read_config(config)
            mlx = config.get("quantization")  # which quantization_config then repeats
            group = None if mlx is None else check_quantization(mlx)
            self._quantization = None if group else _quantization(config, family)
            if self._quantization is not None:
                self.config = replace(self.config, linear_norm_eps=self._quantization.norm_eps)
        except CheckpointError as error:
            raise CheckpointError(f"{config_path}: {error}") from error
        self.notices = [f"{config_path}: {notice}" for notice in notices_of(config)]
        generation_path = path / "generation_config.json"
        if is_there(generation_path):
            generation = read_json(generation_path)
            try:
                self.config = with_generation_config(self.config, generation)
            except CheckpointError as error:
                raise CheckpointError(f"{generation_path}: {error}") from error
        if self._quantization is not None and self._quantization.is_online:
            self.notices.append(
                f"{config_path}: the linears are ternarized from float masters; of a model that "
                "was not trained as BitNet b1.58 that leaves no sense"
            )
        self._aliases = family.aliases
        self._mlx = None if group is None else MlxTensors(path, group)
        self._tensors = self._mlx or SafetensorsFolder(path)
        if self.config.num_layers > len(self._tensors):
            raise CheckpointError(
                f"{config_path}: num_hidden_layers is {self.config.num_layers}; "
                f"the folder holds {len(self._tensors)} tensors"
            )
        self.notices += self._tensors.notices
        self._unread = set(self._tensors)
        self._tie(config_path)
        self.why_dense = None
        self.stored_as = str(self._quantization)
        if self._quantization is None:
            self.why_dense = None if self._looks_ternary() else f"{path}: {_WHY_DENSE}"
            self.stored_as = "floats" if self.why_dense else EXACT_FLOATS
        if self._mlx is not None:
            self.why_dense = self._why_mlx_is_dense(self._mlx)
            self.stored_as = "MLX's groups of 2 bits; W = t · scale"
        self._is_exact = self.why_dense is None and self._quantization is None and not self._mlx
        self.is_ternary = self.why_dense is None and not self._is_exact

    @staticmethod
    def recognizes(path: Path) -> bool:
        return is_there(path / "config.json") and SafetensorsFolder.is_in(path)

    def dense(self, name: str, /, *shape: int, fits: torch.dtype) -> Tensor:
        tensor = self._read(name, shape)
        self._expect_float(name, tensor)
        low, high = tensor.aminmax()  # 13 GB/s on a core of an EPYC; isfinite().all() 0.4
        if not (low.isfinite() and high.isfinite()):  # a NaN is both
            raise self._error(name, "has values that are not finite")
        if not (low.to(fits).isfinite() and high.to(fits).isfinite()):
            raise self._error(
                name, f"has values from {low:.3g} to {high:.3g}, too large for {fits}"
            )
        self._notice_if_zero(name, is_zero=not (low or high))
        return tensor

    def stores_ternary(self, name: str, /) -> bool:
        if self._is_exact:
            stored = self._stored(f"{name}.weight")
            return stored in self._tensors and looks_ternary(self._tensors.read(stored)) is True
        if self._mlx is None or why_not_by_group(self._mlx.group):
            return False
        return self._mlx.is_grouped(self._stored(f"{name}.weight"))

    def ternary(
        self, name: str, /, out_features: int, in_features: int, *, fits: torch.dtype
    ) -> TernaryWeight:
        weight_name = f"{name}.weight"
        if self._mlx is not None:
            return self._packed_groups(self._mlx, weight_name, out_features, in_features, fits)
        if self._is_exact:
            return self._packed_floats(weight_name, (out_features, in_features), fits)
        quantization = self._quantization
        assert quantization is not None
        weight = self._read(weight_name)
        is_packed = weight.dtype == torch.uint8 and not quantization.is_online
        rows = out_features // 4 if is_packed else out_features
        if not is_packed:
            self._expect_float(weight_name, weight, or_packed=not quantization.is_online)
        if tuple(weight.shape) != (rows, in_features) or (is_packed and out_features % 4):
            expected = f"[{out_features}{' / 4' if is_packed else ''}, {in_features}]"
            raise self._error(weight_name, f"has shape {list(weight.shape)}; expected {expected}")
        if quantization.is_online:
            values, scale = ternarize(weight)
            scale_name = weight_name
            if not bool(scale.isfinite()):
                raise self._error(weight_name, "has values that are not finite")
        else:
            unpack = self._unpack if is_packed else self._ternary_values
            values = unpack(weight_name, weight)
            scale_name = f"{name}.weight_scale"
            scale = self._scale(scale_name, is_inverse=quantization.is_inverse)
        self._check_sums(scale_name, scale, scale * in_features, fits)
        self._notice_if_zero(weight_name, is_zero=not any(values.aminmax()))
        try:
            codes = pack(F.pad(values, (0, -in_features % IN_FEATURES_MULTIPLE)))
        except KernelError as error:
            raise self._error(weight_name, str(error)) from error
        return TernaryWeight(codes, scale.expand(out_features).contiguous())

    def check_all_read(self) -> None:
        """Raise CheckpointError if the folder holds a tensor that the model has no place for."""
        extra = sorted(n for n in self._unread if not n.endswith(".rotary_emb.inv_freq"))
        if extra:
            raise self._error(extra[0], f"has no place in this model (and {len(extra) - 1} others)")

    def _looks_ternary(self) -> bool:
        """Return whether linears that are floats look exactly ternary, all of them."""
        if self._mlx is not None:
            return False
        found = {
            looks_ternary(weight)
            for name in self._tensors
            if name.endswith("_proj.weight")
            and (weight := self._tensors.read(name)).dtype in FLOATS
            and weight.dim() == 2  # others are refused where they are read
        }
        return found - {None} == {True}

    def _packed_floats(self, name: str, shape: tuple[int, int], fits: torch.dtype) -> TernaryWeight:
        weight = self._read(name, shape)
        self._expect_float(name, weight)
        try:
            packed = pack_exactly(weight)
        except ValueError as error:
            raise self._error(name, str(error)) from error
        if packed is None:
            raise self._error(name, NOT_EXACT)
        largest = largest_sums(packed, shape[1]).abs().max()
        self._check_sums(name, packed.scales.abs().max(), largest, fits)
        self._notice_if_zero(name, is_zero=not any(weight.aminmax()))
        return packed

    def _why_mlx_is_dense(self, tensors: MlxTensors) -> str | None:
        """Return why the linears of an MLX folder aren't served as ternary ones, or None."""
        linears = [name for name in tensors if name.endswith("_proj.weight")]
        for name in linears:
            if not tensors.is_grouped(name):
                return str(self._error(name, "is not ternary: serve it as dense (--weights dense)"))
        if (reason := why_not_by_group(tensors.group)) is None:
            return None
        for name in linears:
            [first] = tensors.groups(name, num_rows=1)
            if first.by_row() is None:
                return str(self._error(name, reason))
        return None

    def _packed_groups(
        self, tensors: MlxTensors, name: str, rows: int, columns: int, fits: torch.dtype
    ) -> TernaryWeight:
        stored = self._stored(name)
        self._unread.discard(stored)
        if tensors.shape(stored) != (rows, columns):
            actual = list(tensors.shape(stored))
            raise self._error(name, f"has shape {actual}; expected {[rows, columns]}")
        try:
            weight = pack_groups(tensors.groups(stored), rows, columns)
        except ValueError as error:
            raise self._error(name, str(error)) from error
        largest = largest_sums(weight, columns).abs().max()
        self._check_sums(name, weight.scales.abs().max(), largest, fits)
        return weight

    def _check_sums(self, name: str, scale: Tensor, largest: Tensor, fits: torch.dtype) -> None:
        if not bool(largest.to(fits).isfinite()):
            raise self._error(
                name, f"makes weights of {float(scale):.3g}, whose sums are too large for {fits}"
            )

    def _tie(self, config_path: Path) -> None:
        """Drop a tied head that is the embedding; serve one that isn't, as transformers does."""
        head, embedding = self._stored(_HEAD), self._stored(_EMBEDDING)
        if not self.config.is_tied or not {head, embedding} <= self._unread:
            return
        if self._tensors.shape(head) == self._tensors.shape(embedding):
            given = self._tensors.read(head), self._tensors.read(embedding)
            # Others can't be compared, and are refused where they are read.
            if all(tensor.dtype in FLOATS for tensor in given) and torch.equal(*given):
                self._unread.remove(head)
                return
        self.config = replace(self.config, is_tied=False)
        self.notices.append(
            f"{self._tensors.path(head)}: tensor {head!r} is served as the head: it is not the "
            f"embedding, though {config_path.name} has tie_word_embeddings"
        )

    def _stored(self, name: str) -> str:
        """Return the name the folder knows the tensor by."""
        alias = name
        for ours, theirs in self._aliases.items():
            alias = alias.replace(ours, theirs)
        return alias if name not in self._tensors and alias in self._tensors else name

    def _read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        stored = self._stored(name)
        self._unread.discard(stored)
        actual = self._tensors.shape(stored)
        if shape is not None and actual != shape:
            raise self._error(name, f"has shape {list(actual)}; expected {list(shape)}")
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

    def _expect_float(self, name: str, tensor: Tensor, *, or_packed: bool = False) -> None:
        if tensor.dtype not in FLOATS:
            packed = ", or ternary values packed in torch.uint8" if or_packed else ""
            raise self._error(name, f"is {tensor.dtype}; expected a 16- or 32-bit float{packed}")

    def _notice_if_zero(self, name: str, *, is_zero: bool) -> None:
        if is_zero:
            file = self._tensors.path(self._stored(name))
            self.notices.append(f"{file}: tensor {name!r} is all zeros")

    def _error(self, name: str, reason: str) -> CheckpointError:
        stored = self._stored(name)
        return CheckpointError(f"{self._tensors.path(stored)}: tensor {shorten(stored)} {reason}")


def _quantization(config: Mapping[str, Any], family: Family) -> _Quantization | None:
    """Return how a config.json says its linears are ternary, or None where they are dense."""
    quantization = config.get("quantization_config")
    if quantization is None:
        if family.has_ternary_masters:
            return _Quantization(is_online=True, is_inverse=False)
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config is {shorten(quantization)}; expected an object")
    method = quantization.get("quant_method")
    if method != "bitnet":
        raise CheckpointError(f"quant_method {shorten(method)} is not supported; bitnet is")
    kept = quantization.get("modules_to_not_convert") or ["lm_head"]
    if not (
        isinstance(kept, list)
        and all(isinstance(module, str) for module in kept)
        and set(kept) - _NO_LINEARS == _KEPT
    ):
        raise CheckpointError(f"not supported: modules_to_not_convert={shorten(kept)}")
    norm_eps = _norm_eps(quantization)
    linear_class = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    match linear_class, mode:
        case "autobitlinear", "online":
            return _Quantization(is_online=True, is_inverse=False, norm_eps=norm_eps)
        case "autobitlinear", "offline":
            return _Quantization(is_online=False, is_inverse=False, norm_eps=norm_eps)
        case "bitlinear", _:  # which has but one mode and ignores the field
            return _Quantization(is_online=False, is_inverse=True, norm_eps=norm_eps)
        case _:
            raise CheckpointError(
                f"not supported: linear_class={shorten(linear_class)} with "
                f"quantization_mode={shorten(mode)}"
            )


def _norm_eps(quantization: Mapping[str, Any]) -> float | None:
    """Return rms_norm_eps where use_rms_norm puts a norm before each linear, else None."""
    uses, eps = quantization.get("use_rms_norm"), quantization.get("rms_norm_eps")
    if uses not in (None, True, False):
        raise CheckpointError(f"use_rms_norm is {shorten(uses)}; expected true or false")
    if not uses:
        return None
    if eps is None:
        return _LINEAR_NORM_EPS
    if type(eps) is not float:
        raise CheckpointError(f"rms_norm_eps of the linears is {shorten(eps)}; expected a float")
    return eps
