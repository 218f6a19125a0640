"""A runner without arithmetic, for tests and for measuring what everything else costs."""

import math
import zlib
from array import array
from dataclasses import dataclass

from bitwatt.constraints.constraint import Constraint
from bitwatt.model.runner_protocol import PromptLogprobs, StepResult, TokenLogprobsRow
from bitwatt.scheduling.plan import Plan, ScoredSpan
from bitwatt.scheduling.request import Request

__all__ = ["FAKE_HIDDEN_SIZE", "FakeRunner", "fake_token"]

FAKE_HIDDEN_SIZE = 8


def fake_token(prompt_token_ids: list[int], seed: int, position: int, vocab_size: int) -> int:
    """Return the token the fake model draws: a hash of prompt, seed and position."""
    return _token(_key(prompt_token_ids, seed), position, vocab_size)


def _key(prompt_token_ids: list[int], seed: int) -> str:
    return f"{zlib.crc32(repr(prompt_token_ids).encode())},{seed}"


def _token(key: str, position: int, vocab_size: int) -> int:
    return zlib.crc32(f"{key},{position}".encode()) % vocab_size


def _direction(prompt_token_ids: list[int]) -> bytes:
    key = _key(prompt_token_ids, 0)
    values = [_token(key, i, 2001) - 1000.5 for i in range(FAKE_HIDDEN_SIZE)]
    length = math.hypot(*values)
    return array("f", [value / length for value in values]).tobytes()


@dataclass(frozen=True, slots=True)
class _Handle:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class FakeRunner:
    """Draws fake_token for every sampling chunk, and behind drafts. All tokens are equally likely.

    By a grammar it draws the token on which the same number falls among those allowed.

    An embedding is a direction that hangs on the prompt alone.

    num_computed_tokens counts what a model would have computed.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_computed_tokens = 0
        self._keys: dict[int, tuple[Request, str]] = {}  # by row
        self._constraints: dict[int, tuple[Constraint, list[int]]] = {}  # by row, with new tokens

    def launch(self, plan: Plan) -> _Handle:
        tokens: list[int | None] = []
        logprobs: list[TokenLogprobsRow | None] = []
        failures: dict[int, str] = {}
        for chunk in plan.chunks:
            self.num_computed_tokens += chunk.num_tokens
            if chunk.is_admission and chunk.request.grammar is not None:
                self._constrain(chunk.request, chunk.row)
            for i in range(chunk.num_drawn):
                request = chunk.request
                token: int | None = self._draw(request, chunk.row, chunk.position + i)
                if (
                    request.grammar is not None
                    and list(chunk.drafts[:i]) == tokens[len(tokens) - i :]
                ):
                    try:
                        token = self._draw_allowed(chunk.row, token or 0)
                    except ValueError as error:
                        failures[len(tokens)] = str(error)
                        token = None
                tokens.append(token)
                k = request.sampling.logprobs
                logprobs.append(None if k is None else (self._value, self._top(k)))
        scores = [self._score(span) for span in plan.scored]
        embeddings = [_direction(chunk.request.prompt_token_ids) for chunk in plan.embedded]
        return _Handle(StepResult(tokens, logprobs, failures, scores, embeddings))

    def close(self) -> None:
        self._keys.clear()

    def _constrain(self, request: Request, row: int) -> None:
        assert request.grammar is not None
        sampling = request.sampling
        constraint = Constraint(
            request.grammar, sampling.stop_token_ids, min_tokens=sampling.min_tokens
        )
        self._constraints[row] = (constraint, request.tokens[len(request.prompt_token_ids) :])

    def _draw_allowed(self, row: int, number: int) -> int:
        constraint, new_tokens = self._constraints[row]
        mask = int.from_bytes(constraint.advance(new_tokens), "little")
        allowed = [token for token in range(self.vocab_size) if mask >> token & 1]
        new_tokens[:] = [allowed[number % len(allowed)]]
        return new_tokens[0]

    @property
    def _value(self) -> float:
        return -math.log(self.vocab_size)

    def _top(self, k: int) -> list[tuple[int, float]]:
        return [(token, self._value) for token in range(k)]

    def _score(self, span: ScoredSpan) -> PromptLogprobs:
        count, k = len(span.targets), span.num_top
        values, ones = array("f", [self._value]), array("i", [1])
        return PromptLogprobs(
            k,
            (values * count).tobytes(),
            (ones * count).tobytes(),
            (values * (count * k)).tobytes(),
            (array("i", range(k)) * count).tobytes(),
        )

    def _draw(self, request: Request, row: int, position: int) -> int:
        known = self._keys.get(row)
        if known is None or known[0] is not request:
            key = _key(request.prompt_token_ids, request.sampling.seed)
            known = self._keys[row] = (request, key)
        return _token(known[1], position, self.vocab_size)
