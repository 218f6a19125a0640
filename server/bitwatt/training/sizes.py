"""The gap between ternary and 16-bit weights at several sizes, beside the paper's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from bitwatt.bench.paper_figures import PAPER_SIZES
from bitwatt.training.checkpoint import RUN_FILE, RunRecord, load_model, load_record
from bitwatt.training.model import SIZES, Architecture
from bitwatt.training.pipeline import VALIDATION_FILE, Material, run
from bitwatt.training.train import LoopOptions, Validation, Watch

TABLE_FILE = "sizes.json"

_HEAD = (
    "| parameters | tokens | ternary, nats/token | 16-bit | ternary − 16-bit | of answers "
    "| binary − 16-bit |\n|---|--:|--:|--:|--:|--:|--:|"
)


@dataclass(frozen=True, slots=True)
class _Finished:
    record: RunRecord
    validation: Validation
    num_parameters: int


def train_sizes(
    record: RunRecord,
    sizes: Sequence[str],
    learning_rates: Mapping[Architecture, float],
    material: Material,
    runs: Path,
    loop: LoopOptions,
    watch: Watch,
) -> None:
    """Train each size with each architecture that has a learning rate, until the watch stops it.

    runs   gets a folder a size with a run an architecture. With `loop.resume` a run that was begun
           goes on, and one that is done isn't repeated
    """
    for size in sizes:
        for architecture, learning_rate in learning_rates.items():
            folder = runs / size / architecture
            config = replace(SIZES[size], architecture=architecture)
            asked = replace(record, config=config, learning_rate=learning_rate)
            is_there = loop.resume and (folder / RUN_FILE).exists()
            run(asked, material, folder, replace(loop, resume=is_there), watch)
            if watch.is_stopped:
                return


def sizes_table(runs: Path) -> list[dict[str, Any]]:
    """Return a row a size that has a finished run under `runs`: nats a token, by architecture.

    gaps   of text and of answers, by architecture: above the LLaMA of that size and as many tokens
    """
    rows = []
    for size in SIZES:
        found = {
            architecture: finished
            for architecture in get_args(Architecture)
            if (finished := _finished(runs / size / architecture)) is not None
        }
        if not found:
            continue
        dense = found.get("llama")
        rows.append(
            {
                "size": size,
                "models": {
                    architecture: {
                        "num_parameters": one.num_parameters,
                        "num_tokens": one.record.num_tokens,
                        "learning_rate": one.record.learning_rate,
                        "nats_per_token": one.validation.nats_per_token,
                        "answer_nats_per_token": one.validation.answer_nats_per_token,
                    }
                    for architecture, one in found.items()
                },
                "gaps": {
                    architecture: _gaps(one.validation, dense.validation)
                    for architecture, one in found.items()
                    if dense is not None
                    and architecture != "llama"
                    and one.record.num_tokens == dense.record.num_tokens
                },
            }
        )
    return rows


def save_table(rows: list[dict[str, Any]], runs: Path) -> None:
    """Write the rows to `runs`/sizes.json."""
    (runs / TABLE_FILE).write_text(json.dumps(rows, indent=2) + "\n")


def sizes_as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows to read, and the paper's below them."""
    lines = [_HEAD]
    for row in rows:
        models, gaps = row["models"], row["gaps"]
        first = next(iter(models.values()))
        lines.append(
            _line(
                f"{first['num_parameters'] / 1e6:.1f}M",
                f"{first['num_tokens']:,}",
                *(_nats(models.get(name)) for name in ("ternary", "llama")),
                _gap(gaps.get("ternary"), "text"),
                _gap(gaps.get("ternary"), "answers"),
                _gap(gaps.get("binary"), "text"),
            )
        )
    lines += [
        _line(f"{name}, the paper", "", "", "", f"{paper.nats:+.3f}", "", "")
        for name, paper in PAPER_SIZES.items()
        if paper.dense_size == name
    ]
    return "\n".join(lines) + "\n"


def _finished(folder: Path) -> _Finished | None:
    path = folder / VALIDATION_FILE
    if not path.exists():
        return None
    validation = Validation(**json.loads(path.read_text()))
    return _Finished(load_record(folder), validation, load_model(folder).num_parameters())


def _gaps(one: Validation, dense: Validation) -> dict[str, float]:
    return {
        "text": one.nats_per_token - dense.nats_per_token,
        "answers": one.answer_nats_per_token - dense.answer_nats_per_token,
    }


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _nats(model: dict[str, Any] | None) -> str:
    return "" if model is None else f"{model['nats_per_token']:.3f}"


def _gap(gaps: dict[str, float] | None, of: str) -> str:
    return "" if gaps is None else f"{gaps[of]:+.3f}"
