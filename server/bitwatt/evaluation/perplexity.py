"""The likelihood of texts under a served model, in windows that say what each token was given.

The windows are those of lm-evaluation-harness (`loglikelihood_rolling`): a text's tokens in pieces
of `length`, each token predicted once. The first piece follows the model's beginning-of-sequence
token, a later one the token before it, and the last, which is shorter, as many as fill the window.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from bitwatt.checkpoints.gguf_file import is_gguf
from bitwatt.llm import LLM
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.text.gguf_tokenizer import read_gguf_text

__all__ = ["Likelihood", "Window", "agreement", "score_texts", "windows"]

_WINDOWS_AT_ONCE = 64


class Window(NamedTuple):
    """Tokens as a model gets them, of which the last num_scored are predicted."""

    token_ids: Sequence[int]
    num_scored: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of texts, token by token.

    num_bytes  of the texts in UTF-8
    token_ids  what was predicted
    logprobs   of those, natural
    likeliest  the token it held to be the likeliest in each place
    """

    num_bytes: int
    token_ids: list[int]
    logprobs: list[float]
    likeliest: list[int]

    @property
    def nats_per_token(self) -> float:
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Of a token: comparable among models with one tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable among all models."""
        return -math.fsum(self.logprobs) / self.num_bytes / math.log(2)


def windows(token_ids: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """Yield a text's windows, each of length + 1 tokens at most.

    prefix  the token that stands before the text
    """
    num_tokens = len(token_ids)
    for start in range(0, num_tokens, length):
        end = min(start + length, num_tokens)
        given = token_ids[end - length - 1 : end] if start else [prefix, *token_ids[:end]]
        yield Window(given, end - start)


def score_texts(llm: LLM, folder: Path, texts: Iterable[str], length: int) -> Likelihood:
    """Return the likelihood of the texts, with the tokenizer of the model's folder or GGUF file.

    length  tokens of a window; less where the model's context is shorter
    """
    if is_gguf(folder):
        tokenizer = read_gguf_text(folder).tokenizer
    else:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    prefix = [*tokenizer.encode("").ids, *llm.info.eos_token_ids][0]
    length = min(length, llm.info.max_model_len - 1)
    num_bytes = 0
    pieces: list[Window] = []
    for text in texts:
        num_bytes += len(text.encode())
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces += windows(ids, prefix, length)
    scored = Likelihood(num_bytes, [], [], [])
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    for start in range(0, len(pieces), _WINDOWS_AT_ONCE):
        some = pieces[start : start + _WINDOWS_AT_ONCE]
        answers = llm.generate([list(piece.token_ids) for piece in some], sampling)
        for piece, answer in zip(some, answers, strict=True):
            scored.token_ids.extend(piece.token_ids[-piece.num_scored :])
            for entry in answer.prompt_logprobs[-piece.num_scored :]:
                assert entry is not None, "the first token of a window is given"
                scored.logprobs.append(entry.logprob)
                scored.likeliest.append(entry.top[0][0])
    return scored


def agreement(one: Likelihood, other: Likelihood) -> float | None:
    """Return the share of places where both hold one token the likeliest, of those both have.

    None where their tokens differ
    """
    places = min(len(one.token_ids), len(other.token_ids))
    if not places or one.token_ids[:places] != other.token_ids[:places]:
        return None
    pairs = zip(one.likeliest, other.likeliest, strict=False)
    return sum(a == b for a, b in pairs) / places
