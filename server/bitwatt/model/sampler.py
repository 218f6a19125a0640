"""Draws the next tokens of a step in one batched pass on the device.

A row's token depends on its logits, its settings and (seed, position) alone, never on the other
rows: sums run along a row in the row's own order, and randomness comes from a counter-based
generator, so that a request draws the same tokens alone, in a batch, or after preemption.
A row that can't be drawn from, or that raises, fails alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from bitwatt_kernels.backend import DRAW_SETTINGS
from numpy.typing import NDArray
from torch import Tensor

from bitwatt.model.streams import upload
from bitwatt.model.truncation_sampling import NO_TOKEN, draw
from bitwatt.scheduling.request import ResolvedSampling

__all__ = [
    "LEAST_LOGPROB",
    "LogprobsBatch",
    "Sampled",
    "Sampler",
    "SamplingRow",
    "TokenDrawer",
    "TokenMasks",
    "counter_uniform",
    "drawing_settings",
]

LEAST_LOGPROB = -9999.0
"""Stands for a probability of 0, as in OpenAI's API: JSON has no infinity."""

_Uint64s = NDArray[np.uint64]
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: _Uint64s) -> _Uint64s:
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def counter_uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return one uniform number in [0, 1) for each (seed, position), float64.

    Source  SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014), applied twice
    """
    seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    bits = _mix(_mix(seed + _GOLDEN_GAMMA) + (position + np.uint64(1)) * _GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits to draw from.

    row       the request's row of the per-request state
    position  of the token drawn
    num_output_tokens  tokens drawn before it
    drafts    tokens taken for drawn before it by rows above, one each: what is drawn here holds if
              those have drawn the same
    """

    row: int
    position: int
    num_output_tokens: int
    sampling: ResolvedSampling
    drafts: Sequence[int] = ()

    @property
    def is_adjusted(self) -> bool:
        """Whether the request's own settings change its logits before one is drawn."""
        s = self.sampling
        needs_more = self.num_output_tokens < s.min_tokens and s.grammar is None
        return s.has_penalties or bool(s.logit_bias) or needs_more


def drawing_settings(
    rows: Sequence[SamplingRow], masked: Sequence[int] = (), out: Tensor | None = None
) -> Tensor:
    """Return what a TokenDrawer draws by, [R, 6] float64.

    Of each row temperature, top_k, top_p, min_p, its uniform number, and which mask is its, or -1.

    masked  TokenMasks.rows
    out     memory for R rows at least, on the host
    """
    if out is None:
        out = torch.empty(len(rows), len(DRAW_SETTINGS), dtype=torch.float64)
    out = out[: len(rows)]
    settings = out.numpy()
    sampling = [r.sampling for r in rows]
    known = [(s.temperature, s.top_k, s.top_p, s.min_p) for s in sampling]
    settings[:, :4] = np.reshape(known, (len(rows), 4))  # also of a step that draws nothing
    settings[:, 4] = counter_uniform([s.seed for s in sampling], [r.position for r in rows])
    settings[:, 5] = -1
    settings[masked, 5] = range(len(masked))
    return out


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some of the rows may draw.

    rows      their indices among those drawn from, in any order
    bits      [len(rows), words] int32: a bit a token, the lowest first, on the sampler's device
    failures  why a row of no bits has none, by its index, fit for the caller
    """

    rows: list[int]
    bits: Tensor
    failures: dict[int, str]


@dataclass(frozen=True, slots=True)
class LogprobsBatch:
    """Log-probabilities before temperature and filters: of the sampled token, and the top ones.

    A masked row's are of the tokens that its mask allows; the others have LEAST_LOGPROB.
    """

    sampled: Tensor  # [R] float32
    top_values: Tensor  # [R, k] float32
    top_tokens: Tensor  # [R, k] int64


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens drawn, still on the device.

    tokens    NO_TOKEN in rows that failed
    failures  why, by row, where something was raised; else the row's logits aren't finite
    """

    tokens: Tensor  # [R] int64
    logprobs: LogprobsBatch | None
    failures: dict[int, str]


@runtime_checkable
class TokenDrawer(Protocol):
    """A backend that masks and draws a step's rows by kernels of its own."""

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        """Give the tokens that a row's mask lacks a logit of -inf, in place.

        logits  [.., vocab_size] float32
        rows    M of logits' rows, each once
        bits    [M, words] int32: a bit a token, the lowest first, for vocab_size at least
        """
        ...

    def draw_tokens(
        self, logits: Tensor, settings: Tensor, bits: Tensor | None, best: Tensor | None = None
    ) -> Tensor:
        """Return a token for each row of logits, [R] int64; NO_TOKEN where none can be drawn.

        Waits for nothing, so that a graph can capture it.

        logits    [R, vocab_size] float32; may be overwritten
        settings  [R, 6] float64, what drawing_settings returns
        bits      [M, words] int32, masks as mask_logits takes them; None where no row has one
        best      what the head has found of these logits, or None
        """
        ...


class Sampler:
    """Keeps the token counts that penalties need, one row a running request.

    begin must precede the first draw of a request with penalties, again after preemption.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        drawer: TokenDrawer | None = None,
    ) -> None:
        """Begin with no counts.

        drawer  draws in place of truncation_sampling.draw, which waits for a GPU, and takes ten
                times as long on a CPU
        """
        self._drawer = drawer
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._device = device
        self._counts: Tensor | None = None  # [max_num_seqs, vocab_size] int32, of outputs
        self._in_prompt: Tensor | None = None  # [max_num_seqs, vocab_size] bool

    def begin(self, row: int, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        """Set the row's counts for a request with penalties that begins, or resumes, to run."""
        if self._counts is None or self._in_prompt is None:
            shape = (self._max_num_seqs, self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._in_prompt[row] = False
        self._in_prompt[row, self._upload(prompt)] = True
        drawn = self._upload(outputs)
        counts = self._counts[row].zero_()
        counts.index_add_(0, drawn, torch.ones_like(drawn, dtype=torch.int32))

    def _upload(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(values, dtype, self._device)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        masks: TokenMasks | None = None,
        settings: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Sampled:
        """Return one token a row, one that its mask allows; counts it for the row's penalties.

        A row without a finite largest logit, after penalties and biases, gets NO_TOKEN.

        logits    [R, vocab_size] float32; may be overwritten
        settings  drawing_settings(rows, masks.rows) on the device, where they are there
        drawn     what the drawer has drawn of these logits as they are; returned where it holds
        """
        if masks is not None or any(r.is_adjusted for r in rows):
            drawn = None  # of other logits
        num_logprobs = max(
            (r.sampling.logprobs for r in rows if r.sampling.logprobs is not None), default=None
        )
        if masks is not None:
            self._mask(logits, masks, are_read=num_logprobs is not None)
        log_probabilities = None if num_logprobs is None else logits.log_softmax(dim=-1)
        if masks is not None and log_probabilities is not None:
            log_probabilities.clamp_(min=LEAST_LOGPROB)
        failures = self._adjust(logits, rows)
        if masks is not None:
            failures = masks.failures | failures
        if drawn is not None:
            tokens = drawn
        elif self._drawer is not None:
            if settings is None:
                settings = drawing_settings(rows, () if masks is None else masks.rows)
                settings = upload(settings, settings.dtype, self._device)
            bits = None if masks is None else masks.bits
            tokens = self._drawer.draw_tokens(logits, settings, bits)
        else:
            tokens = _argmax(logits)
            failures |= self._draw_some(logits, rows, tokens)
        if failures:
            tokens.index_fill_(0, self._upload(list(failures)), NO_TOKEN)
        if self._counts is not None:
            self._count(tokens.clamp(min=0), rows)
        logprobs = None
        if log_probabilities is not None and num_logprobs is not None:
            top = log_probabilities.topk(num_logprobs, dim=-1)
            sampled = log_probabilities.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
            logprobs = LogprobsBatch(sampled, top.values, top.indices)
        return Sampled(tokens, logprobs, failures)

    def _mask(self, logits: Tensor, masks: TokenMasks, *, are_read: bool) -> None:
        """Give the tokens that a row's mask lacks a logit of -inf.

        are_read  whether the logits are, besides by what draws: a TokenDrawer knows the masks
        """
        if self._drawer is None:
            _mask(logits, masks)
        elif are_read:
            self._drawer.mask_logits(logits, masks.rows, masks.bits)

    def _draw_some(
        self, logits: Tensor, rows: Sequence[SamplingRow], tokens: Tensor
    ) -> dict[int, str]:
        """Draw the tokens that aren't the best, by torch; return why some failed, by row."""

        def run(index: list[int]) -> None:
            where = self._upload(index)
            chosen = [rows[i] for i in index]
            uniform = counter_uniform(
                [r.sampling.seed for r in chosen], [r.position for r in chosen]
            )
            uniforms = upload(torch.from_numpy(uniform), torch.float64, self._device)
            tokens[where] = draw(logits[where], [r.sampling for r in chosen], uniforms)

        return _isolated([i for i, r in enumerate(rows) if r.sampling.temperature > 0], run)

    def _adjust(self, logits: Tensor, rows: Sequence[SamplingRow]) -> dict[int, str]:
        penalized = [i for i, r in enumerate(rows) if r.sampling.has_penalties]
        failures = _isolated(penalized, lambda index: self._penalize(logits, index, rows))
        for i, r in enumerate(rows):
            if r.sampling.logit_bias:
                failures |= _isolated([i], lambda index: self._bias(logits, index[0], rows))
            # A constraint's mask knows of min_tokens, and that its grammar may leave nothing else.
            if r.num_output_tokens < r.sampling.min_tokens and r.sampling.grammar is None:
                # What the model has no row for is never drawn anyway.
                stops = [t for t in r.sampling.stop_token_ids if 0 <= t < self._vocab_size]
                if stops:
                    logits[i].index_fill_(0, self._upload(stops), -torch.inf)
        return failures

    def _bias(self, logits: Tensor, i: int, rows: Sequence[SamplingRow]) -> None:
        biases = rows[i].sampling.logit_bias
        tokens = self._upload(list(biases))
        logits[i].index_add_(0, tokens, self._upload(list(biases.values()), torch.float32))

    def _penalize(self, logits: Tensor, index: list[int], rows: Sequence[SamplingRow]) -> None:
        assert self._counts is not None
        assert self._in_prompt is not None
        state = self._upload([rows[i].row for i in index])
        counts, in_prompt = self._counts[state], self._in_prompt[state]
        repetition, frequency, presence = (
            self._upload([getattr(rows[i].sampling, name) for i in index], torch.float32)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        for place, i in enumerate(index):
            if drafts := rows[i].drafts:
                ones = self._upload([1] * len(drafts), counts.dtype)
                counts[place].index_add_(0, self._upload(drafts), ones)
        where = self._upload(index)
        x = logits[where]
        factor = torch.where(x > 0, 1 / repetition[:, None], repetition[:, None])
        x = torch.where((counts > 0) | in_prompt, x * factor, x)
        x = x - frequency[:, None] * counts - presence[:, None] * (counts > 0)
        logits[where] = x

    def _count(self, tokens: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Count what was drawn for each row's request, but for what follows a wrong draft."""
        if self._counts is None:
            return
        state = self._upload([r.row for r in rows])
        if not any(r.drafts for r in rows):
            self._counts[state, tokens] += 1
            return
        drafts = self._upload([r.drafts[-1] if r.drafts else NO_TOKEN for r in rows])
        first = self._upload([i - len(r.drafts) for i, r in enumerate(rows)])
        is_wrong = (drafts != NO_TOKEN) & (drafts != tokens.roll(1))
        num_wrong = is_wrong.cumsum(0)
        holds = (num_wrong == num_wrong[first]).to(self._counts.dtype)
        self._counts.index_put_((state, tokens), holds, accumulate=True)


def _isolated(index: list[int], run: Callable[[list[int]], None]) -> dict[int, str]:
    """Run rows at once or, where that raises, one after the other; return why some failed, by row.

    run must change nothing where it raises.
    """
    if not index:
        return {}
    try:
        run(index)
    except Exception as error:  # whatever it is, it is that row's
        if len(index) == 1:
            return {index[0]: f"its token could not be drawn: {error}"}
        failures: dict[int, str] = {}
        for i in index:
            failures |= _isolated([i], run)
        return failures
    return {}


def _mask(logits: Tensor, masks: TokenMasks) -> None:
    """Give the tokens that a row's mask lacks a logit of -inf. On a CPU: each GPU has a drawer."""
    octets = ~masks.bits.numpy().view(np.uint8)  # while packed: a pass over the tokens less
    denied = torch.from_numpy(
        np.unpackbits(octets, axis=-1, count=logits.shape[1], bitorder="little").view(np.bool_)
    )
    if masks.rows == [*range(len(logits))]:
        logits.masked_fill_(denied, -torch.inf)
    else:
        where = torch.tensor(masks.rows)
        logits[where] = logits[where].masked_fill(denied, -torch.inf)


def _argmax(logits: Tensor) -> Tensor:
    """Return each row's best token, [R]; NO_TOKEN where its logit isn't finite.

    Any NaN counts as best, then any infinity, so the best one tells of them all; only what is -inf
    and not best is left, which can't be drawn. A look at every logit would cost as much again. On
    a CPU, as each GPU has a drawer; by numpy, 7 times as fast as torch on a Zen 5 core.
    """
    values = logits.numpy()
    indices = values.argmax(axis=-1)
    # Row by row, in Python: numpy would let go of the GIL for it, and the engine's thread then keep
    # it for 50 µs, a tenth of the embedded model's step on two Zen 4 cores.
    for row, token in enumerate(indices.tolist()):
        if not math.isfinite(values[row, token]):
            indices[row] = NO_TOKEN
    return torch.from_numpy(indices)
