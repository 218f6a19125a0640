"""What a model's files hold, and what serving them will take."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.checkpoints.survey import Survey
from bitwatt.engine.forecast import forecast
from bitwatt.engine.messages import EngineConfig
from bitwatt.errors import BitwattError, CheckpointError
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.serving.sampling_params import checked_defaults
from bitwatt.text.codec import TextCodec

__all__ = ["as_markdown", "inspect"]

_BACKENDS = ("native", "torch", "triton", "reference")


_MATRIX_HEAD = ("ternary", "number", "out × in", "−1", "0", "+1", "scale", "one a")
_MEMORY_HEAD = ("MB", "backend", "packed", "embedding", "other", "KV cache", "all", "context")


def inspect(path: Path, *, quantize: bool = False, **engine: Any) -> dict[str, Any]:
    """Return what is at path: family, sizes, matrices, warnings, and memory by backend.

    Every tensor is read. "refused" has what loading would end at.

    quantize  what it is once its dense linears are ternarized
    engine    settings of EngineConfig besides path, weights, backend and device
    Raises    CheckpointError for what can't be opened
    """
    checkpoint = open_checkpoint(path, quantize=quantize)
    survey = Survey(checkpoint)
    kinds: tuple[Weights, ...] = (
        ("ternary", "dense") if checkpoint.why_dense is None else ("dense",)
    )
    memory = [
        {"weights": weights, "backend": backend} | _memory(survey, path, weights, backend, engine)
        for weights in kinds
        for backend in _BACKENDS
    ]
    if not survey.refused:
        survey.finish()
    sampling, why_no_text = _sampling(path)
    refused = list(dict.fromkeys([*survey.refused, *why_no_text]))
    matrices = [asdict(matrix) | {"kind": _kind(matrix.name)} for matrix in survey.matrices]
    return {
        "path": str(path),
        "file_bytes": _file_bytes(path),
        "family": checkpoint.config.architecture,
        "stored_as": checkpoint.stored_as,
        "sizes": _sizes(checkpoint.config),
        "parameters": _parameters(survey),
        "matrices": matrices,
        "sampling": sampling,
        "refused": refused,
        "warnings": survey.warnings,
        "memory": memory,
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return what inspect() found as tables, matrices of one kind in one row."""
    sizes = ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
    stored = f"{found['stored_as']}; {found['file_bytes'] / 1e6:.1f} MB of weights"
    numbers = [(name, f"{number:,}") for name, number in found["parameters"].items()]
    lines = [
        f"# {found['path']}",
        "",
        f"{found['family']}: {stored}. {sizes}.",
        "",
        *_table(("parameters", "number"), numbers),
    ]
    if found["matrices"]:
        lines += ["", *_table(_MATRIX_HEAD, _matrix_rows(found["matrices"]))]
    lines += ["", *_table(_MEMORY_HEAD, map(_memory_row, found["memory"]))]
    if found["sampling"]:
        told = ", ".join(f"{name} {value}" for name, value in found["sampling"].items())
        lines += ["", f"Where a request is silent: {told}."]
    for title in ("refused", "warnings"):
        if found[title]:
            lines += ["", f"{title.capitalize()}:", *(f"- {told}" for told in found[title])]
    return "\n".join(lines) + "\n"


def _matrix_rows(matrices: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    def by_kind(matrix: Mapping[str, Any]) -> str:
        return str(matrix["kind"])

    for kind, group in groupby(sorted(matrices, key=by_kind), by_kind):
        its = list(group)
        shapes = {f"{one['out_features']} × {one['in_features']}" for one in its}
        shares = [
            f"{_range(one[name] * 100 for one in its)} %" for name in ("minus", "zero", "plus")
        ]
        scales = _range(bound for one in its for bound in (one["lowest"], one["highest"]))
        rules = ", ".join(sorted({one["scales"] for one in its}))
        yield (kind, str(len(its)), ", ".join(sorted(shapes)), *shares, scales, rules)


def _range(values: Iterable[float]) -> str:
    lowest, *_, highest = sorted([*values] * 2)
    low, high = f"{lowest:.3g}", f"{highest:.3g}"
    return low if low == high else f"{low}–{high}"


def _memory_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return (row["weights"], row["backend"], row["refused"], *[""] * 5)
    names = ("packed_weights", "embedding", "other_weights", "kv_cache", "total")
    sizes = [f"{row[f'{name}_bytes'] / 1e6:.1f}" for name in names]
    return (row["weights"], row["backend"], *sizes, str(row["max_model_len"]))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [tuple(head), *map(tuple, rows)]
    lines.insert(1, tuple("---" for _ in lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def _memory(
    survey: Survey, path: Path, weights: Weights, backend: str, engine: Mapping[str, Any]
) -> dict[str, Any]:
    config = EngineConfig(model_path=str(path), weights=weights, backend=backend, **engine)
    try:
        use, max_model_len = forecast(survey, config)
    except BitwattError as error:
        return {"refused": str(error)}
    parts = {
        "packed_weights_bytes": use.packed_weights_bytes,
        "embedding_bytes": use.embedding_bytes,
        "other_weights_bytes": use.other_weights_bytes,
        "kv_cache_bytes": use.kv_cache_bytes,
    }
    return parts | {"total_bytes": sum(parts.values()), "max_model_len": max_model_len}


def _parameters(survey: Survey) -> dict[str, int]:
    """Return how many there are by kind: a tied head is no other than the embedding."""
    numbers = dict.fromkeys(("embedding", "head", "norms", "dense linears", "ternary linears"), 0)
    ternary = {f"{matrix.name}.weight" for matrix in survey.matrices}
    for name, number in survey.parameters.items():
        if name.startswith("model.embed_tokens"):
            kind = "embedding"
        elif name.startswith("lm_head"):
            kind = "head"
        elif name in ternary:
            kind = "ternary linears"
        else:
            kind = "norms" if "norm" in name.rpartition(".weight")[0] else "dense linears"
        numbers[kind] += number
    return {name: number for name, number in numbers.items() if number} | {
        "all": sum(numbers.values())
    }


def _kind(name: str) -> str:
    """Return a linear's name without its layer's."""
    return name.rpartition(".")[2]


def _sizes(config: ModelConfig) -> dict[str, int]:
    values = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    return {
        name: value
        for name, value in values.items()
        if type(value) is int and not name.endswith("token_id")
    }


def _file_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _sampling(path: Path) -> tuple[dict[str, float], list[str]]:
    """Return the defaults for requests, and what ends the reading of the model's texts."""
    try:
        told = TextCodec.from_folder(path).sampling_defaults
        return dict(checked_defaults(told, path, "auto")), []
    except CheckpointError as error:
        return {}, [str(error)]
