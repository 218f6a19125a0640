"""Two models' likelihoods of the same texts: bits a byte, and how often one token leads in both."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitwatt_client.errors import ComparisonError, ServerError, StreamError
from bitwatt_client.prompts import Line
from bitwatt_client.server import Server
from bitwatt_client.terminal import plural, printable

__all__ = [
    "Likelihood",
    "QualityComparison",
    "compare_quality",
    "quality_as_json",
    "quality_as_table",
]

_REFUSED = (400, 413, 422)
_MAX_REFUSALS_TOLD = 10


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of texts.

    num_bytes  of what was predicted, in UTF-8
    token_ids  what was predicted: all but a text's first token, which is BOS where the model has it
    logprobs   of those, natural
    likeliest  the token it held to be the likeliest in each place
    """

    num_bytes: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]

    @property
    def bits_per_byte(self) -> float:
        """Comparable among all models."""
        return -math.fsum(self.logprobs) / self.num_bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """Of a token: comparable among models with one tokenizer."""
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityComparison:
    """What came out; names are those of the models.

    agreement  share of places where both hold one token the likeliest; None where their tokens
               differ
    """

    name_a: str
    name_b: str
    num_texts: int
    a: Likelihood
    b: Likelihood
    agreement: float | None


async def compare_quality(
    a: Server,
    b: Server,
    lines: Sequence[Line],
    *,
    concurrency: int = 8,
    on_text: Callable[[int], None] | None = None,
) -> QualityComparison:
    """Return how likely the two models hold the texts, each scored whole and by itself.

    on_text  takes how many are scored, of both models together

    Raises  ComparisonError with the lines that a server refused, or if no token was predicted
    """
    slots = asyncio.Semaphore(concurrency)
    refusals: dict[tuple[int, int], str] = {}  # by line and model
    num_done = 0

    async def scored(side: int, server: Server, line: Line) -> Likelihood | None:
        nonlocal num_done
        async with slots:
            try:
                likelihood = await _score(server, line.text)
            except ServerError as error:
                if error.status not in _REFUSED:
                    raise
                refusals[line.number, side] = f"line {line.number}: {server.model}: {error}"
                return None
        num_done += 1
        if on_text is not None:
            on_text(num_done)
        return likelihood

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                [group.create_task(scored(side, server, line)) for line in lines]
                for side, server in enumerate((a, b))
            ]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    if refusals:
        by_line: dict[int, str] = {}
        for (number, _), refusal in sorted(refusals.items()):
            by_line.setdefault(number, refusal)
        told = list(by_line.values())
        more = len(told) - _MAX_REFUSALS_TOLD
        if more > 0:
            told = [*told[:_MAX_REFUSALS_TOLD], f"and {plural(more, 'line')} more"]
        raise ComparisonError("\n".join(told))
    of_a, of_b = (_joined([one for task in row if (one := task.result())]) for row in tasks)
    if not of_a.logprobs or not of_b.logprobs:
        raise ComparisonError("the texts are of one token each, which nothing predicts")
    return QualityComparison(
        name_a=a.model,
        name_b=b.model,
        num_texts=len(lines),
        a=of_a,
        b=of_b,
        agreement=_agreement(of_a, of_b),
    )


async def _score(server: Server, text: str) -> Likelihood:
    """Return the likelihood of a text, of its first token only where BOS stands before it."""
    answer = await server.complete(text, max_tokens=0, echo=True, logprobs=0, prompt_logprobs=1)
    try:
        [choice] = answer["choices"]
        places = choice["prompt_logprobs"][1:]
        offsets = [*choice["logprobs"]["text_offset"], len(text)]
        own = [next(iter(place)) for place in places]  # the text's token stands first
        return Likelihood(
            num_bytes=len(text[offsets[1] :].encode()),
            token_ids=tuple(map(int, own)),
            logprobs=tuple(
                float(place[token]["logprob"]) for place, token in zip(places, own, strict=True)
            ),
            likeliest=tuple(
                int(max(place, key=lambda token: float(place[token]["logprob"])))
                for place in places
            ),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise StreamError(
            f"{server.url} tells no log-probabilities of a prompt (echo, prompt_logprobs)"
        ) from error


def _joined(likelihoods: Sequence[Likelihood]) -> Likelihood:
    return Likelihood(
        num_bytes=sum(one.num_bytes for one in likelihoods),
        token_ids=tuple(token for one in likelihoods for token in one.token_ids),
        logprobs=tuple(value for one in likelihoods for value in one.logprobs),
        likeliest=tuple(token for one in likelihoods for token in one.likeliest),
    )


def _agreement(a: Likelihood, b: Likelihood) -> float | None:
    if a.token_ids != b.token_ids:
        return None
    same = sum(one == other for one, other in zip(a.likeliest, b.likeliest, strict=True))
    return same / len(a.likeliest)


def quality_as_json(comparison: QualityComparison) -> dict[str, Any]:
    """Return the comparison as plain data; agreement is null where there is none."""
    quality: dict[str, Any] = {
        "num_texts": comparison.num_texts,
        "top_1_agreement": comparison.agreement,
    }
    for side, likelihood in (("a", comparison.a), ("b", comparison.b)):
        quality[side] = {
            "bits_per_byte": likelihood.bits_per_byte,
            "perplexity": likelihood.perplexity,
            "num_bytes": likelihood.num_bytes,
            "num_tokens": len(likelihood.token_ids),
        }
    return {"a": comparison.name_a, "b": comparison.name_b, "quality": quality}


def quality_as_table(comparison: QualityComparison) -> str:
    """Return the comparison as lines of text for a terminal."""
    a, b = comparison.a, comparison.b
    rows = [
        ("", comparison.name_a, comparison.name_b),
        ("bits per byte", f"{a.bits_per_byte:.4f}", f"{b.bits_per_byte:.4f}"),
        ("perplexity of a token", f"{a.perplexity:.3f}", f"{b.perplexity:.3f}"),
        ("tokens predicted", f"{len(a.token_ids):,}", f"{len(b.token_ids):,}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    shown = ["  ".join([row[0].ljust(widths[0]), *_right(row[1:], widths[1:])]) for row in rows]
    agreed = (
        f"Both hold the same token the likeliest in {100 * comparison.agreement:.2f}% of places."
        if comparison.agreement is not None
        else "Their tokens differ, so no place can be compared with another."
    )
    title = (
        f"{comparison.name_a} against {comparison.name_b}: "
        f"{plural(comparison.num_texts, 'text')}, {a.num_bytes:,} bytes"
    )
    return printable("\n".join([title, "", *shown, "", agreed]))


def _right(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
