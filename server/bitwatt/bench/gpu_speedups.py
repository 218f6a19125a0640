"""Ternary models beside dense ones, from the rows that both have."""

from typing import Any

__all__ = ["speedups"]


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ternary beside dense, a row a model, phase and size that both have run."""
    keys = ("model", "phase", "num_sequences", "new_tokens")
    done = {
        (*(row[key] for key in keys), row["weights"]): row
        for row in rows
        if "skipped" not in row and not (row["pdl"] or row["persistent_step"])
    }
    pairs = []
    for (*key, weights), dense in done.items():
        ternary = done.get((*key, "ternary"))
        if weights != "dense" or ternary is None:
            continue
        pair = dict(zip(keys, key, strict=True))
        pair["speedup"] = dense["step"]["median_s"] / ternary["step"]["median_s"]
        if "launched" in dense:
            launched = dense["launched"]["median_s"] / ternary["launched"]["median_s"]
            pair["speedup_launched"] = launched
        for figure in ("weight_bytes", "peak_bytes", "joules_per_token"):
            both = dense[figure], ternary[figure]
            pair[f"{figure}_ratio"] = both[0] / both[1] if all(both) else None
        pairs.append(pair)
    return pairs
