"""What the engine's core asks of whatever runs a step. Imports no torch."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from bitwatt.scheduling.plan import Plan

__all__ = [
    "PromptLogprobs",
    "Runner",
    "StepResult",
    "StepResultHandle",
    "TokenLogprobsRow",
]

TokenLogprobsRow = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Natural-log probabilities of neighbouring tokens of a prompt, each given those before it.

    Packed, in the machine's own byte order: 8 · (1 + num_top) bytes a token.

    num_top  how many of the likeliest tokens are kept at each
    values   float32, of the prompt's own tokens
    ranks    int32, of the same: 1 for the likeliest
    top_values, top_token_ids  float32 and int32, num_top a token, best first
    """

    num_top: int
    values: bytes
    ranks: bytes
    top_values: bytes
    top_token_ids: bytes

    def __len__(self) -> int:
        return len(self.values) // 4

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the parts of one prompt, in order, as one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            first.num_top,
            b"".join([part.values for part in parts]),
            b"".join([part.ranks for part in parts]),
            b"".join([part.top_values for part in parts]),
            b"".join([part.top_token_ids for part in parts]),
        )

    def unpacked(self) -> list[tuple[float, int, list[tuple[int, float]]]]:
        """Return the log-probability, the rank and the likeliest tokens with theirs, by token."""
        k = self.num_top
        top = list(zip(_ints(self.top_token_ids), _floats(self.top_values), strict=True))
        return [
            (value, rank, top[i * k : (i + 1) * k])
            for i, (value, rank) in enumerate(
                zip(_floats(self.values), _ints(self.ranks), strict=True)
            )
        ]


def _floats(data: bytes) -> list[float]:
    return array("f", data).tolist()


def _ints(data: bytes) -> list[int]:
    return array("i", data).tolist()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew, as many entries a chunk as it draws tokens.

    tokens    None where none could be drawn
    logprobs  None where not asked for
    failures  of each None among the tokens, by its index: why, fit for the caller
    prompt_logprobs  one entry a span of the plan's; None where they aren't finite
    embeddings  one a chunk that the plan embeds: hidden_size float32 of length 1, in the machine's
                own byte order; None where they aren't finite
    """

    tokens: Sequence[int | None]
    logprobs: list[TokenLogprobsRow | None]
    failures: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: Sequence[PromptLogprobs | None] = ()
    embeddings: Sequence[bytes | None] = ()


class StepResultHandle(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Return the result once the device is done; raises what the step raised."""
        ...


class Runner(Protocol):
    """Runs plans in order. The engine's core needs nothing else of a model."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id it takes."""
        ...

    def launch(self, plan: Plan) -> StepResultHandle:
        """Start the plan's step behind those launched before; at most two may be under way."""
        ...

    def close(self) -> None:
        """Release threads and device memory."""
        ...
