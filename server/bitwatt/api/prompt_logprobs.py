"""A prompt's log-probabilities, as the APIs have them.

Long prompts are put beside the event loop: 4096 tokens with 20 each take 0.1 s.
"""

from collections.abc import Sequence
from functools import partial

from bitwatt.api.schemas.common import PromptLogprob
from bitwatt.api.schemas.completions import CompletionLogprobs
from bitwatt.engine.messages import PromptLogprobs
from bitwatt.serving.generation import Generation
from bitwatt.text.detokenizer import Detokenizer, TextOffsets
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["PromptEntries", "echoed_logprobs", "likely", "prompt_entries"]

PromptEntries = list[dict[int, PromptLogprob] | None]
"""By token of a prompt: the token itself and the likeliest ones; None for the first."""


async def prompt_entries(generation: Generation, index: int) -> PromptEntries:
    """Return what vLLM's `prompt_logprobs` has of a choice's prompt."""
    text, token_ids = generation.model.text, generation.submits[index].prompt_token_ids
    logprobs = generation.prompt_logprobs(index)
    put = partial(_entries, token_ids, logprobs, text.vocabulary)
    return await text.run(put, _work(token_ids, logprobs))


async def echoed_logprobs(
    generation: Generation, index: int, echo: str, num_top: int
) -> CompletionLogprobs:
    """Return what OpenAI's `logprobs` has of the prompt that a choice's text begins with.

    echo     the text it begins with
    num_top  how many of the likeliest tokens to return at each token
    """
    text, token_ids = generation.model.text, generation.submits[index].prompt_token_ids
    logprobs = generation.prompt_logprobs(index)
    put = partial(_echoed, token_ids, logprobs, text.vocabulary, echo, num_top)
    return await text.run(put, _work(token_ids, logprobs))


def likely(
    vocabulary: Vocabulary, token: str, logprob: float, top: Sequence[tuple[int, float]]
) -> dict[str, float]:
    """Return log-probabilities by spelling: of the likeliest tokens, and of one more.

    Tokens may be spelled alike, those that are parts of characters; the likeliest one's is given.
    """
    by_spelling: dict[str, float] = {}
    for token_id, value in top:
        by_spelling.setdefault(vocabulary.spell(token_id), value)
    by_spelling.setdefault(token, logprob)
    return by_spelling


def _work(token_ids: Sequence[int], logprobs: PromptLogprobs | None) -> int:
    return len(token_ids) * (2 + (0 if logprobs is None else logprobs.num_top))


def _entries(
    token_ids: Sequence[int], logprobs: PromptLogprobs | None, vocabulary: Vocabulary
) -> PromptEntries:
    spell = vocabulary.spell
    entries: PromptEntries = [None]
    scored = [] if logprobs is None else logprobs.unpacked()
    for token_id, (value, rank, top) in zip(token_ids[1:], scored, strict=True):
        entry = {token_id: PromptLogprob(value, rank, spell(token_id))}
        for at, (top_id, top_value) in enumerate(top, start=1):
            if top_id != token_id:
                entry[top_id] = PromptLogprob(top_value, at, spell(top_id))
        entries.append(entry)
    return entries


def _echoed(
    token_ids: Sequence[int],
    logprobs: PromptLogprobs | None,
    vocabulary: Vocabulary,
    echo: str,
    num_top: int,
) -> CompletionLogprobs:
    tokens = [vocabulary.spell(token_id) for token_id in token_ids]
    scored = [] if logprobs is None else logprobs.unpacked()
    values: list[float | None] = [None]
    likeliest: list[dict[str, float] | None] = [None]
    for token, (value, _, top) in zip(tokens[1:], scored, strict=True):
        values.append(value)
        likeliest.append(likely(vocabulary, token, value, top[:num_top]))
    offsets = TextOffsets(vocabulary, literal=True)
    starts = [offsets.push(token_id) for token_id in token_ids]
    # What the tokenizer put before a text is no part of the echo.
    detokenizer = Detokenizer(vocabulary, literal=True)
    before = max(0, (detokenizer.push(token_ids) + detokenizer.finish()).find(echo))
    in_echo = [min(max(start - before, 0), len(echo)) for start in starts]
    return CompletionLogprobs(tokens, values, likeliest, in_echo)
