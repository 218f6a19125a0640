"""What `bitwatt eval` measures of a model, its own variants and its twin, as tables."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwatt.bench.engine import decode_rate
from bitwatt.bench.measure import describe_machine
from bitwatt.errors import (
    BitwattError,
    CheckpointError,
    ConfigurationError,
    EngineStartError,
    InvalidRequestError,
)
from bitwatt.evaluation.answering import score_answers
from bitwatt.evaluation.perplexity import Likelihood, agreement, score_texts
from bitwatt.evaluation.scores import Score, Scores
from bitwatt.llm import LLM
from bitwatt.model.config import KVCacheDtype, Weights

__all__ = ["Work", "as_markdown", "evaluate"]

_BATCH = 32
_REPEATS = 3
_OTHER_BACKENDS = ("torch", "reference")
_HEAD = (
    "| model | parameters | perplexity | bits/byte | phrasings | sums | completions parse "
    f"| weights, MB | tokens/s, alone | tokens/s, {_BATCH} together |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)
_TEXTS_OF_A_BACKEND = 2
_CHARS_OF_A_BACKEND = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every model is given.

    texts          for perplexity
    window_tokens  of the windows in evaluation/perplexity.py
    every          one question, sum and prompt of so many; of more than one, speeds are of one run
    """

    texts: Sequence[str]
    window_tokens: int = 256
    every: int = 1
    num_threads: int | None = None


def evaluate(
    folder: Path, twin: Path | None, work: Work, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return the figures of each model and how far they agree.

    folder  a ternary model; one with dense weights alone is evaluated as such
    twin    a model with dense weights, trained on the same data
    report  takes a line as each model is begun

    Raises  BitwattError
    """
    rows: dict[str, dict[str, Any]] = {}
    likelihoods: dict[str, Likelihood] = {}
    agreements: list[dict[str, Any]] = []

    def add(name: str, path: Path, weights: Weights, kv_cache_dtype: KVCacheDtype = "auto") -> None:
        with LLM(
            path, weights=weights, num_threads=work.num_threads, kv_cache_dtype=kv_cache_dtype
        ) as llm:
            report(f"{name} …")
            likelihood = score_texts(llm, path, work.texts, work.window_tokens)
            likelihoods[name] = likelihood
            rows[name] = {
                "folder": path.name,
                "weights": weights,
                "backend": llm.info.backend,
                "dtype": llm.info.dtype,
                "kv_cache_dtype": llm.info.kv_cache_dtype,
                "num_parameters": llm.info.num_parameters,
                "perplexity": likelihood.perplexity,
                "nats_per_token": likelihood.nats_per_token,
                "bits_per_byte": likelihood.bits_per_byte,
                "num_tokens": len(likelihood.token_ids),
                "answers": _answers(llm, work.every),
                **_cost(llm, _REPEATS if work.every == 1 else 1),
            }

    def add_int8_cache(of: str, path: Path) -> None:
        name = f"{of}, int8 KV cache"
        try:
            add(name, path, rows[of]["weights"], "int8")
        except (ConfigurationError, EngineStartError) as error:  # a GPU's backend, or the heads
            report(f"{name}: {error}")
        else:
            agreements.append(_pair(likelihoods, of, name))

    ternary, dense = "ternary", "ternary weights in 16 bits"
    try:
        add(ternary, folder, "ternary")
    except CheckpointError:
        dense = "16-bit"
        add(dense, folder, "dense")
    else:
        add(dense, folder, "dense")
        agreements.append(_pair(likelihoods, ternary, dense))
        agreements += _backends(folder, rows[ternary]["backend"], work, report)
    first = next(iter(rows))
    add_int8_cache(first, folder)
    if twin is not None:
        add("16-bit twin", twin, "dense")
        agreements.append(_pair(likelihoods, first, "16-bit twin"))
        add_int8_cache("16-bit twin", twin)
    return {
        "machine": describe_machine(),
        "num_texts": len(work.texts),
        "window_tokens": work.window_tokens,
        "every": work.every,
        "models": rows,
        "agreement": agreements,
    }


def _answers(llm: LLM, every: int) -> dict[str, Any] | None:
    """Return the scores; None for a model without chat template, or with too short a context."""
    try:
        scores: Scores = score_answers(llm, every)
    except InvalidRequestError:
        return None
    return {
        "phrasings": _share(scores.phrasings),
        "phrasings_by_topic": {name: _share(one) for name, one in scores.by_topic.items()},
        "sums": _share(scores.sums),
        "completions": _share(scores.completions),
    }


def _share(score: Score) -> dict[str, Any]:
    return asdict(score) | {"share": score.share}


def _cost(llm: LLM, repeats: int) -> dict[str, Any]:
    memory = llm.info.memory
    weights = memory.packed_weights_bytes + memory.embedding_bytes + memory.other_weights_bytes
    return {
        "weights_bytes": weights,
        "tokens_per_s": {
            str(batch): asdict(decode_rate(llm, batch, repeats)) for batch in (1, _BATCH)
        },
    }


def _pair(likelihoods: dict[str, Likelihood], one: str, other: str) -> dict[str, Any]:
    return {
        "of": one,
        "with": other,
        "top_1": agreement(likelihoods[one], likelihoods[other]),
        "num_tokens": len(likelihoods[one].token_ids),
    }


def _backends(
    folder: Path, chosen: str, work: Work, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return how far other backends agree with the chosen one, on the beginnings of a few texts."""
    texts = [text[:_CHARS_OF_A_BACKEND] for text in work.texts[:_TEXTS_OF_A_BACKEND]]
    likelihoods: dict[str, Likelihood] = {}
    rows = []
    for backend in (chosen, *(name for name in _OTHER_BACKENDS if name != chosen)):
        try:
            llm = LLM(folder, backend=backend, num_threads=work.num_threads)
        except BitwattError as error:
            report(f"{backend}: {error}")
            continue
        with llm:
            report(f"ternary, {backend} …")
            likelihoods[backend] = score_texts(llm, folder, texts, work.window_tokens)
        if backend != chosen:
            rows.append(_pair(likelihoods, chosen, backend))
    return rows


def as_markdown(tables: dict[str, Any]) -> str:
    """Return what `evaluate` returned, to read."""
    machine = tables["machine"]
    models = [_HEAD]
    for name, row in tables["models"].items():
        answers = row["answers"]
        kinds = ("phrasings", "sums", "completions")
        shares = [_percent(answers and answers[kind]["share"]) for kind in kinds]
        cells = [
            f"{name} ({row['backend']})",
            f"{row['num_parameters'] / 1e6:.1f}M",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            *shares,
            f"{row['weights_bytes'] / 1e6:.2f}",
            *(f"{rate['median']:,.0f}" for rate in row["tokens_per_s"].values()),
        ]
        models.append(f"| {' | '.join(cells)} |")
    agreements = ["| same likeliest token | share | of tokens |", "|---|--:|--:|"]
    agreements += [
        f"| {row['of']} and {row['with']} | {_percent(row['top_1'], 2)} | {row['num_tokens']:,} |"
        for row in tables["agreement"]
    ]
    any_row = next(iter(tables["models"].values()))
    about = (
        f"{tables['num_texts']} texts of {any_row['num_tokens']:,} tokens, in windows of "
        f"{tables['window_tokens']}, each token predicted once: after the beginning of the text, "
        "or of its window and one token more. Phrasings, sums and beginnings of Python were held "
        f"out of the embedded pair's training; one of {tables['every']} is asked, greedily. "
        f"{machine['num_cpus']} processors of {machine['cpu']}; bitwatt "
        f"{machine['versions']['bitwatt']}, commit {machine['commit'] or 'unknown'}."
    )
    parts = ["\n".join(models)]
    if tables["agreement"]:
        parts.append("\n".join(agreements))
    return "\n\n".join([*parts, about]) + "\n"


def _percent(share: float | None, digits: int = 1) -> str:
    return "none" if share is None else f"{100 * share:.{digits}f}%"
