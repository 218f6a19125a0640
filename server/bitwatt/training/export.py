"""A trained run in the files that Hugging Face reads: packed 2-bit BitNet, or a bfloat16 LLaMA."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from bitwatt.checkpoints.bitnet_packing import pack_bitnet
from bitwatt.training.model import LanguageModel, ModelConfig
from bitwatt.training.ternary import BitLinear, weight_scale
from bitwatt.training.tokenizer import BOS, EOS, EOT, save_tokenizer, token_id


def export(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `config.json`, `model.safetensors`, `generation_config.json` and the tokenizer.

    Embeddings and norms are rounded to bfloat16, and so is every weight of a LLaMA. A linear with
    codes becomes them and its scale, exactly: the scale stays in float32, and −1 and 1 are ternary
    codes too.
    """
    save_tokenizer(tokenizer, folder)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            tensors[f"{name}.weight"] = pack_bitnet(module.codes(module.weight.detach()))
            tensors[f"{name}.weight_scale"] = weight_scale(module.weight.detach()).reshape(1)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    stop_ids = [token_id(tokenizer, EOS), token_id(tokenizer, EOT)]
    bos_id = token_id(tokenizer, BOS)
    _write_json(folder / "config.json", _config(model.config, bos_id, stop_ids[0]))
    _write_json(
        folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": stop_ids}
    )


@torch.no_grad()
def round_as_exported(model: LanguageModel) -> None:
    """Round in place the parameters that `export` rounds, so that evaluation is of what it writes.

    A linear with codes keeps its masters, whose codes and scale are exported as they are.
    """
    masters = {id(module.weight) for module in model.modules() if isinstance(module, BitLinear)}
    for parameter in model.parameters():
        if id(parameter) not in masters:
            parameter.copy_(parameter.to(torch.bfloat16))


def _config(config: ModelConfig, bos_id: int, eos_id: int) -> dict[str, object]:
    shared: dict[str, object] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.architecture == "llama":
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "mlp_bias": False,
            "model_type": "llama",
        }
    return shared | {
        "architectures": ["BitNetForCausalLM"],
        "hidden_act": "relu2",
        "model_type": "bitnet",
        "quantization_config": {
            "linear_class": "autobitlinear",
            "quant_method": "bitnet",
            "quantization_mode": "offline",
        },
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
