"""A runner without arithmetic, for tests and for measuring what everything else costs."""

import zlib
from dataclasses import dataclass

from bitwatt.model.runner_protocol import StepResult
from bitwatt.scheduling.request import Request
from bitwatt.scheduling.scheduler import Plan

__all__ = ["FakeRunner", "fake_token"]


def fake_token(prompt_token_ids: list[int], seed: int, position: int, vocab_size: int) -> int:
    """Return the token the fake model draws: a hash of prompt, seed and position."""
    return _token(_key(prompt_token_ids, seed), position, vocab_size)


def _key(prompt_token_ids: list[int], seed: int) -> str:
    return f"{zlib.crc32(repr(prompt_token_ids).encode())},{seed}"


def _token(key: str, position: int, vocab_size: int) -> int:
    return zlib.crc32(f"{key},{position}".encode()) % vocab_size


@dataclass(frozen=True, slots=True)
class _Handle:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class FakeRunner:
    """Draws fake_token for every sampling chunk.

    num_computed_tokens counts what a model would have computed.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_computed_tokens = 0
        self._keys: dict[int, tuple[Request, str]] = {}  # by row

    def launch(self, plan: Plan) -> _Handle:
        tokens = []
        for chunk in plan.chunks:
            self.num_computed_tokens += chunk.num_tokens
            if chunk.samples:
                tokens.append(self._draw(chunk.request, chunk.row, chunk.position))
        return _Handle(StepResult(tokens, [None] * len(tokens)))

    def close(self) -> None:
        self._keys.clear()

    def _draw(self, request: Request, row: int, position: int) -> int:
        known = self._keys.get(row)
        if known is None or known[0] is not request:
            key = _key(request.prompt_token_ids, request.sampling.seed)
            known = self._keys[row] = (request, key)
        return _token(known[1], position, self.vocab_size)
