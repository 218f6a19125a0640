"""Shapes of published models, for benchmarks on random weights."""

from dataclasses import replace

from bitwatt.model.config import ModelConfig

__all__ = ["PRESETS"]


def _llama(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> ModelConfig:
    """Return a LLaMA shape as in arXiv:2402.17764: untied, vocabulary of 32000."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_model_len=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        activation="silu",
        has_sub_norms=False,
        is_tied=False,
        eos_token_ids=(2,),
    )


def _bonsai(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int
) -> ModelConfig:
    """Return the shape of a Ternary-Bonsai of PrismML's, without Qwen3's norms of heads."""
    return replace(
        _llama(hidden_size, intermediate_size, num_layers, num_heads, 8),
        vocab_size=151669,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        is_tied=True,
        eos_token_ids=(151645,),
    )


PRESETS = {
    "2B4T": ModelConfig(
        architecture="BitNetForCausalLM",
        vocab_size=128256,
        hidden_size=2560,
        intermediate_size=6912,
        num_layers=30,
        num_heads=20,
        num_kv_heads=5,
        head_dim=128,
        max_model_len=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        activation="relu2",
        has_sub_norms=True,
        is_tied=True,
        bos_token_id=128000,
        eos_token_ids=(128001, 128009),
    ),
    "700M": _llama(1536, 4096, 24, 16, 16),
    "1.3B": _llama(2048, 5460, 24, 32, 32),
    "3B": _llama(3200, 8640, 26, 32, 32),
    "3.9B": _llama(3200, 12800, 24, 32, 32),  # the paper prints no sizes: these make 3.9 billion
    "7B": _llama(4096, 11008, 32, 32, 32),
    "13B": _llama(5120, 13824, 40, 40, 40),
    "70B": _llama(8192, 28672, 80, 64, 8),
    "Bonsai 1.7B": _bonsai(2048, 6144, 28, 16),
    "Bonsai 4B": _bonsai(2560, 9728, 36, 32),
    "Bonsai 8B": replace(_bonsai(4096, 12288, 36, 32), is_tied=False),
}
