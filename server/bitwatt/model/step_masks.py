"""The token masks of a step: of the requests with a grammar, and behind their drafts.

Masks are computed while a step's layers run (constraints/masks.py): they follow from the tokens
that the step before has drawn, and from drafts, which are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.cpu.token_masks import MaskLane, MatcherCalls
from torch import Tensor

from bitwatt.constraints.constraint import Constraint, Trial
from bitwatt.constraints.masks import MaskThread
from bitwatt.model.sampler import TokenMasks
from bitwatt.model.streams import Event, Stream, upload
from bitwatt.model.truncation_sampling import NO_TOKEN
from bitwatt.scheduling.request import Request

__all__ = ["MaskLanes", "MaskedDraws", "StepMasks"]


@dataclass(frozen=True, slots=True)
class MaskedDraws:
    """Those of a step's draws that a grammar constrains.

    constraints  by index among the draws, of a chunk's first
    drafts       of those chunks that have some, by the same index
    indices      of all: those of constraints, and then the ones behind their drafts
    """

    constraints: dict[int, Constraint]
    drafts: dict[int, Sequence[int]]
    indices: list[int]

    @classmethod
    def of(
        cls, constraints: dict[int, Constraint], drafts: dict[int, Sequence[int]]
    ) -> "MaskedDraws":
        """Return the draws of these constraints and drafts."""
        behind = [i + 1 + j for i, tokens in drafts.items() for j in range(len(tokens))]
        return cls(constraints, drafts, [*constraints, *behind])


@runtime_checkable
class MaskLanes(Protocol):
    """A backend whose threads advance matchers while they wait for the next step."""

    def mask_lane(self, calls: MatcherCalls) -> MaskLane: ...


@dataclass(frozen=True, slots=True)
class _DrawnTokens:
    """Tokens that a step draws of constrained requests, and when a GPU's have come."""

    draws: MaskedDraws
    tokens: Tensor  # [R] int64, on the host
    has_come: Event | None

    def asked(self) -> list[tuple[Constraint, Sequence[int]]]:
        """Return what a MaskThread is asked for, once they have come."""
        drafts, drawn = self.draws.drafts, self.tokens.tolist()
        return [
            (constraint, _kept(drawn, i, drafts[i]) if i in drafts else (drawn[i],))
            for i, constraint in self.draws.constraints.items()
            if drawn[i] != NO_TOKEN
        ]


class StepMasks:
    """The constraints of a runner's requests, and the masks of its steps, in their order."""

    def __init__(self, backend: Backend, stream: Stream | None) -> None:
        """Begin without a constraint.

        stream  that the steps are queued on; None on a CPU
        """
        self._thread = MaskThread(backend.mask_lane if isinstance(backend, MaskLanes) else None)
        self._device = backend.device
        self._stream = stream
        self._bits = torch.empty(0, 0, dtype=torch.int32)  # a CPU's, and the same as bytes
        self._bytes = memoryview(b"")
        self._constraints: dict[int, tuple[Request, Constraint]] = {}  # by row
        self._drawn: _DrawnTokens | None = None  # by the step before

    def close(self) -> None:
        self._thread.close()

    def begin(self, request: Request, row: int) -> None:
        """Begin, or begin again, the grammar of a request that gets the row."""
        assert request.grammar is not None
        ended = [i for i, (r, _) in self._constraints.items() if r.finish_reason is not None]
        for i in ended:
            del self._constraints[i]
        sampling = request.sampling
        constraint = Constraint(
            request.grammar, sampling.stop_token_ids, min_tokens=sampling.min_tokens
        )
        self._constraints[row] = (request, constraint)
        self._thread.ask([(constraint, request.tokens[len(request.prompt_token_ids) :])])

    def constraint_of(self, row: int) -> Constraint:
        """Return where the request of the row stands in its grammar."""
        return self._constraints[row][1]

    def try_drafts(self, draws: MaskedDraws) -> dict[int, Trial]:
        """Have the masks behind the drafts of constrained requests computed while the layers run.

        Drafts are known, and so is what came before them: nothing here is worth a GPU's wait.
        """
        if not draws.drafts:
            return {}
        self.take_what_came()
        self._thread.settle()
        trials = {i: draws.constraints[i].trial() for i in draws.drafts}
        for i, trial in trials.items():
            self._thread.ask([(trial, [draft]) for draft in draws.drafts[i]])
        return trials

    def masks_of(self, draws: MaskedDraws, trials: dict[int, Trial]) -> TokenMasks:
        """Return the masks, once the thread has them: they were asked for before the layers ran.

        On a GPU they are of tokens that the step before draws: this step's layers are queued
        behind it, and run while the tokens come and their masks are computed.
        """
        self.take_what_came()
        self._thread.settle()
        masks = [constraint.mask for constraint in draws.constraints.values()]
        failures = {
            i: constraint.failure
            for i, constraint in draws.constraints.items()
            if constraint.failure is not None
        }
        for i, trial in trials.items():
            for j in range(len(draws.drafts[i])):
                if j < len(trial.masks):
                    masks.append(trial.masks[j])
                else:  # a draft before it is not allowed, or nothing is behind it
                    masks.append(trial.grammar.no_tokens)
                    failures[i + 1 + j] = trial.failure or ""
        return TokenMasks(draws.indices, self._bits_of(masks), failures)

    def follow(self, draws: MaskedDraws, tokens: Tensor) -> None:
        """Have the masks computed that follow the tokens which a step draws.

        On a CPU at once, where that needs no interpreter; else by the next take_what_came.

        tokens  [R] int64, on the host; a GPU's once the stream comes to here
        """
        has_come = None if self._stream is None else self._stream.record()
        drawn = _DrawnTokens(draws, tokens, has_come)
        if has_come is not None or not self._start(drawn):
            self._drawn = drawn

    def take_what_came(self) -> None:
        """Have the masks computed that follow the tokens of the step before.

        On a CPU when the layers begin, where that isn't begun yet: until then a thread of Python's
        would take turns with the step's for the GIL.
        """
        came, self._drawn = self._drawn, None
        if came is None:
            return
        if came.has_come is not None:
            came.has_come.synchronize()
            if self._start(came):
                return
        self._thread.ask(came.asked())

    def _start(self, drawn: _DrawnTokens) -> bool:
        """Have the masks that follow these tokens computed natively; return whether they are."""
        draws = drawn.draws
        return not draws.drafts and self._thread.start(draws.constraints, drawn.tokens)

    def _bits_of(self, masks: Sequence[bytes | bytearray]) -> Tensor:
        """Return the masks where the device reads them, [len(masks), words] int32."""
        joined = b"".join(masks)
        if self._stream is not None:
            words = torch.frombuffer(bytearray(joined), dtype=torch.int32)
            return upload(words.view(len(masks), -1), torch.int32, self._device)
        # The step before, which read what was here, is done; new tensors would take 20 µs.
        if len(self._bytes) < len(joined):
            self._bits = torch.empty(len(masks), len(masks[0]) // 4, dtype=torch.int32)
            self._bytes = self._bits.numpy().data.cast("B")
        self._bytes[: len(joined)] = joined
        return self._bits[: len(masks)]


def _kept(drawn: Sequence[int], first: int, drafts: Sequence[int]) -> list[int]:
    """Return the tokens drawn up to the first that is not the draft, or that couldn't be drawn.

    drawn  from first on behind the token before the drafts, and behind each draft
    """
    kept = [drawn[first]]
    for draft, token in zip(drafts, drawn[first + 1 : first + 1 + len(drafts)], strict=True):
        if kept[-1] != draft or token == NO_TOKEN:
            break
        kept.append(token)
    return kept
