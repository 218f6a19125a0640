"""Tiny random checkpoints, written by transformers and run by transformers."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

__all__ = [
    "Family",
    "edit_config",
    "random_model",
    "sizes",
    "with_ternary_linears",
    "write_dense",
    "write_online",
    "write_packed",
]

Family = Literal["bitnet", "llama", "mistral", "qwen2", "qwen3"]

_CLASSES = {
    "bitnet": "BitNet",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}


@cache
def _transformers() -> Any:
    """Return the package, with BitNet's linears imported.

    That takes 4 s, which every worker would wait while it collects the tests.
    """
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of torch.jit, which torch.compile imports
        import transformers.integrations.bitnet
    transformers.utils.logging.disable_progress_bar()
    return transformers


def sizes(**changes: Any) -> dict[str, Any]:
    """Return the config of a tiny model, every size its own."""
    return {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }


def random_model(family: Family, seed: int, **changes: Any) -> Any:
    """Return a float32 model with weights wide enough for its logits to differ."""
    transformers = _transformers()
    from transformers.initialization import no_init_weights

    config_class = getattr(transformers, f"{_CLASSES[family]}Config")
    model_class = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")
    # Every parameter is drawn below: what transformers would draw first takes a third of the time.
    with no_init_weights():
        model = model_class(config_class(**sizes(**changes))).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5
        parameter.data = 1 + 0.2 * noise if "norm" in name else noise * scale
    return model


def write_dense(folder: Path, family: Family = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Write a float32 checkpoint without quantization; return its model.

    max_shard_size, where given, splits it into several files.
    """
    shard = {"max_shard_size": changes.pop("max_shard_size", "5GB")}
    model = random_model(family, seed, **changes)
    model.save_pretrained(folder, **shard)
    return model


def write_online(
    folder: Path, family: Family, *, norm_eps: float | None = None, seed: int = 0, **changes: Any
) -> Any:
    """Write float32 masters to be ternarized while loading; return a model that does so.

    norm_eps  of an RMSNorm of each linear's own, or None
    """
    model = random_model(family, seed, **changes)
    model.save_pretrained(folder)
    norms = _add_linear_norms(folder, norm_eps, seed)
    _set_quantization(folder, linear_class="autobitlinear", quantization_mode="online", **norms)
    return _with_bit_linears(model, folder)


def write_packed(
    folder: Path,
    family: Family,
    *,
    linear_class: Literal["autobitlinear", "bitlinear"],
    is_unpacked: bool = False,
    norm_eps: float | None = None,
    are_scales_spread: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Write ternary weights, four a byte, with a scale that multiplies or divides.

    is_unpacked  store the ternary values as floats, as transformers saves autobitlinear models
    norm_eps     of an RMSNorm of each linear's own, or None
    are_scales_spread  each matrix's is multiplied by a number of its own, from 0.5 to 1.5
    """
    model = random_model(family, seed, **changes)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    pack_weights = _transformers().integrations.bitnet.pack_weights
    generator = torch.Generator().manual_seed(seed)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        scale = weight.abs().mean()
        values = (weight / scale).round().clamp(-1, 1)
        if are_scales_spread:
            scale = scale * (0.5 + torch.rand((), generator=generator))
        stored = scale if linear_class == "autobitlinear" else 1 / scale
        tensors[name] = values if is_unpacked else pack_weights(values.clone())
        tensors[f"{name}_scale"] = stored.reshape(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    norms = _add_linear_norms(folder, norm_eps, seed)
    _set_quantization(folder, linear_class=linear_class, quantization_mode="offline", **norms)
    return _with_bit_linears(model, folder)


def with_ternary_linears(model: Any, folder: Path) -> Any:
    """Return the model with BitNet's linears, of a model whose weights are ternary already.

    folder  to write it to
    """
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].abs().max()
        tensors[name] = (tensors[name] / scale).round()
        tensors[f"{name}_scale"] = scale.reshape(1)
        bias = name.replace(".weight", ".bias")
        if bias in tensors:  # which AutoBitLinear multiplies by the scale
            tensors[bias] = tensors[bias] / scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _set_quantization(folder, linear_class="autobitlinear", quantization_mode="offline")
    return _with_bit_linears(model, folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of the folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _add_linear_norms(folder: Path, eps: float | None, seed: int) -> dict[str, Any]:
    """Add a norm of each linear's own to the folder's tensors; return the fields that say so."""
    if eps is None:
        return {}
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = 1 + 0.2 * torch.randn(tensors[name].shape[1], generator=generator)
        tensors[name.replace(".weight", ".rms_norm.weight")] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"use_rms_norm": True, "rms_norm_eps": eps}


def _set_quantization(folder: Path, **fields: Any) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitnet", **fields})


def _with_bit_linears(model: Any, folder: Path) -> Any:
    """Return the model with transformers' own BitNet linears, holding the folder's tensors."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    del quantization["quant_method"]
    transformers = _transformers()
    transformers.integrations.bitnet.replace_with_bitnet_linear(
        model,
        modules_to_not_convert=["lm_head"],
        quantization_config=transformers.BitNetQuantConfig(**quantization),
    )
    tensors = load_file(folder / "model.safetensors")
    if quantization["linear_class"] == "autobitlinear":
        tensors = {n: _unpack(t) if t.dtype == torch.uint8 else t for n, t in tensors.items()}
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    if "lm_head.weight" in missing:
        model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        if type(module).__name__ == "BitLinear":
            module.dtype = torch.float32  # left None by the class that replaces
    return model.eval()


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1
