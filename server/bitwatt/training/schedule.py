"""Learning rate and weight decay as functions of how far a run has come."""

from dataclasses import dataclass

from bitwatt.training.model import Architecture

WARM_UP = 0.02
FINAL_FRACTION = 0.02
SECOND_STAGE_START = 0.5
SECOND_STAGE_FACTOR = 2 / 3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True, slots=True)
class Rates:
    """What the optimizer uses for one step."""

    learning_rate: float
    weight_decay: float


def rates_at(progress: float, architecture: Architecture, peak: float) -> Rates:
    """Return the rates at `progress` (0 to 1) of a run whose highest learning rate is `peak`.

    All architectures warm up and then decay linearly. Halfway, the learning rate of one with codes
    is cut to two thirds and its weight decay ends: its codes have mostly settled by then, and
    decay would only push weights across the rounding thresholds.

    Source   "The Era of 1-bit LLMs: Training Tips, Code and FAQ", section 2
    """
    warm_up = min(progress / WARM_UP, 1.0)
    decay = FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 - min(progress, 1.0))
    learning_rate = peak * warm_up * decay
    if architecture != "llama" and progress >= SECOND_STAGE_START:
        return Rates(learning_rate * SECOND_STAGE_FACTOR, 0.0)
    return Rates(learning_rate, WEIGHT_DECAY)
