"""Small configs for the trainer's tests."""

from typing import Any

from bitwatt.training.model import Architecture, ModelConfig

__all__ = ["make_training_config"]


def make_training_config(architecture: Architecture = "ternary", **changes: Any) -> ModelConfig:
    """Return the config of a model that trains in a blink."""
    given: dict[str, Any] = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position": 128,
    }
    return ModelConfig(architecture, **(given | changes))
