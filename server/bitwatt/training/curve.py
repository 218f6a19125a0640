"""A run's curve as CSV, and as a picture where matplotlib is."""

import csv
from pathlib import Path

from bitwatt.training.card import Line

_DRAWN = {
    "training_nats_per_token": "training",
    "validation_nats_per_token": "held-out text",
    "answer_nats_per_token": "held-out answers",
}


def save_csv(curve: tuple[Line, ...], path: Path) -> None:
    """Write a row an evaluation, under the names that `loss.jsonl` has."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def save_png(curve: tuple[Line, ...], path: Path) -> bool:
    """Draw the losses by tokens seen. Return whether: not without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    picture = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    tokens = [line["tokens"] / 1e6 for line in curve]
    for name, label in _DRAWN.items():
        axes.plot(tokens, [line[name] for line in curve], marker=".", label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, format="png")
    return True
