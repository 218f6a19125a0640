"""Small configs and texts for the trainer's tests."""

from typing import Any

from bitwatt.training.data import TokenDocument, TrainingData, pack
from bitwatt.training.model import Architecture, ModelConfig

__all__ = ["make_training_config", "make_training_data"]


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


def make_training_data(num_documents: int = 60) -> TrainingData:
    """Return documents that count upwards by 7 from anywhere, and so are quickly learned."""

    def counting(start: int, size: int, num_asked: int) -> TokenDocument:
        tokens = [(start + 7 * index) % 64 for index in range(size)]
        return TokenDocument(tokens, [index >= num_asked for index in range(size)])

    text = [counting(start, 100 + start, 0) for start in range(num_documents)]
    answers = [counting(start, 10 + start % 20, 5) for start in range(num_documents)]
    return TrainingData(
        text=pack(text[4:]),
        instructions=pack(answers[4:]),
        held_out_text=pack(text[:4]),
        held_out_answers=pack(answers[:4]),
        tokens_per_byte=0.3,
    )
