"""The step loop: plan, launch, commit. One step runs on the device while the next is planned.

One request's trouble stays its own. A row whose token can't be drawn ends its request. A step that
raises ends the requests it computed for; all others are computed again from their tokens. When
MAX_FAILED_STEPS have raised in a row, the fault is the engine's (a lost device, say): it ends.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from bitwatt.constraints.grammars import Grammar, Grammars
from bitwatt.engine.messages import (
    EngineStats,
    PromptLogprobs,
    Submit,
    TokenBytes,
    TokenLogprobs,
    TokenOutput,
)
from bitwatt.errors import EngineError, shorten
from bitwatt.model.runner_protocol import Runner, StepResult, StepResultHandle
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import FinishReason, Request
from bitwatt.scheduling.scheduler import RequestTooLongError, Scheduler

if TYPE_CHECKING:  # it needs torch, without which an engine says why it can't start
    from bitwatt.engine.roofline import MemoryTimer

__all__ = ["MAX_FAILED_STEPS", "EngineCore"]

MAX_FAILED_STEPS = 3
_COMPILE_WAIT_S = 0.005  # of a step with nothing to do but wait for a grammar

_NOT_FINITE = "the logits of its prompt are not finite, so it has no log-probabilities"
_NO_EMBEDDING = "the hidden state of its last token is not finite, so it has no embedding"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Times:
    """Monotonic seconds of a request's turning points."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    handle: StepResultHandle
    launched_s: float


@dataclass(slots=True)
class _NotLaunched:
    """A step whose launch raised."""

    error: Exception

    def wait(self) -> StepResult:
        raise self.error


class EngineCore:
    """A scheduler and a runner, advanced by step(). Single-threaded; knows no sockets.

    Every submitted request ends in exactly one output with a finish_reason.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: Sequence[int] = (),
        memory_timer: "MemoryTimer | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without requests; eos_token_ids are the model's own."""
        self._scheduler = scheduler
        self._runner = runner
        self._memory_timer = memory_timer
        self._clock = clock
        self._times: dict[str, _Times] = {}
        self._scores: dict[str, list[PromptLogprobs]] = {}  # of prompts, until the first token
        self._in_flight: _InFlight | None = None
        self._grammars = Grammars(runner.vocab_size, eos_token_ids)
        self._compiling: dict[str, tuple[Request, Future[Grammar]]] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_prompt_tokens = 0
        self._num_failed_steps = 0  # since one succeeded
        self._busy_s = 0.0
        self._last_commit = 0.0
        self._step_tokens = 0
        self._step_s = 0.0
        self._step_prefill: dict[str, int] = {}
        self._step_drafts: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None or bool(self._compiling)

    @property
    def knows_tokens(self) -> bool:
        """Whether learn_tokens was called."""
        return self._grammars.knows_tokens

    def learn_tokens(self, token_bytes: TokenBytes) -> None:
        """Take the bytes of the model's tokens, which grammars need."""
        self._grammars.learn(token_bytes)

    def why_no_grammar(self, grammar: str) -> str | None:
        """Return why the grammar can't be followed, once it is compiled; None where it can."""
        return _why_unusable(self._grammars.compile(grammar))

    def submit(self, message: Submit) -> TokenOutput | None:
        """Queue a request; returns its only output if it can never run, or need not."""
        refused = self._take(message)
        if refused is None:
            sent_s = self._clock() if message.sent_s is None else message.sent_s
            self._times[message.request_id] = _Times(sent_s)
        return refused

    def _take(self, message: Submit) -> TokenOutput | None:
        wrong = self._wrong_token_id(message)
        if wrong is not None:
            return _refusal(message, wrong)
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            priority=message.priority,
            cache_salt=message.cache_salt,
        )
        if request.sampling.max_tokens == 0 and request.is_scored:
            return TokenOutput(
                request_id=message.request_id, token_ids=[], finish_reason=FinishReason.LENGTH
            )
        grammar = request.sampling.grammar
        if grammar is None or request.sampling.max_tokens == 0:
            return self._add(request)
        if not self._grammars.knows_tokens:
            return _refusal(request, "the engine was not told the tokens that a grammar is of")
        compiled = self._grammars.compile(grammar)
        if compiled.done():
            return self._add_compiled(request, compiled)
        self._compiling[request.request_id] = (request, compiled)
        return None

    def _add(self, request: Request) -> TokenOutput | None:
        try:
            self._scheduler.add(request)
        except RequestTooLongError as error:
            return _refusal(request, str(error))
        return None

    def _add_compiled(self, request: Request, compiled: Future[Grammar]) -> TokenOutput | None:
        if reason := _why_unusable(compiled):
            return _refusal(request, f"its grammar can't be followed: {reason}")
        request.grammar = compiled.result()
        return self._add(request)

    def abort(self, request_ids: list[str]) -> list[TokenOutput]:
        """End requests; ids that have already ended are passed over."""
        outputs = []
        for request_id in request_ids:
            compiling = self._compiling.pop(request_id, None)
            request = compiling[0] if compiling else self._scheduler.abort(request_id)
            if request is not None:
                outputs.append(self._output(request, [], [], FinishReason.ABORT))
        return outputs

    def step(self) -> list[TokenOutput]:
        """Plan and launch a step, then wait for the one before it and return what that brought.

        Raises  EngineError where MAX_FAILED_STEPS in a row have failed
        """
        outputs = self._take_compiled() if self._compiling else []
        done, self._in_flight = self._in_flight, self._launch_next()
        if done is not None:
            outputs += self._commit(done)
            if self._in_flight is None:
                # What waited to know this step's tokens goes on before anyone is told of them.
                self._in_flight = self._launch_next()
        return outputs

    def _launch_next(self) -> _InFlight | None:
        plan = self._scheduler.plan()
        if not plan.chunks:
            return None
        now = self._clock()
        for chunk in plan.chunks:
            if chunk.is_admission:
                times = self._times[chunk.request.request_id]
                times.admitted = times.admitted or now
        return _InFlight(plan, self._launch(plan), now)

    def check_integrity(self) -> None:
        """Raise AssertionError if a block, a row or a request is lost; for idle moments."""
        self._scheduler.check_integrity()

    def time_memory(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Look how fast memory is, if that isn't known yet; for idle moments.

        is_wanted  whether a request waits: then the look is put off
        """
        if self._memory_timer is not None:
            self._memory_timer.look(is_wanted)

    def stats(self, rss_anon_bytes: int | None = None) -> EngineStats:
        """Return gauges now and counters since the start."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        timer = self._memory_timer
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._compiling),
            num_blocks_used=scheduler.blocks.num_used,
            num_blocks=scheduler.blocks.num_blocks,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_prompt_tokens=self._num_cached_prompt_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_preemptions=counters.num_preemptions,
            num_drafts=counters.num_drafts,
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=counters.num_accepted_tokens,
            num_prefix_cache_queries=counters.num_prefix_cache_queries,
            num_prefix_cache_hits=counters.num_prefix_cache_hits,
            num_steps=self._num_steps,
            step_tokens=self._step_tokens,
            step_s=self._step_s,
            step_ended_s=self._last_commit,
            step_prefill=self._step_prefill,
            step_drafts=self._step_drafts,
            time_s=self._clock(),
            busy_s=self._busy_s,
            rss_anon_bytes=rss_anon_bytes,
            read_bytes_per_s=None if timer is None else timer.read_bytes_per_s,
        )

    def close(self) -> None:
        """Release the runner; the core is not used again."""
        self._grammars.close()
        self._runner.close()

    def _take_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammars are compiled; return the outputs of those refused."""
        if not self._scheduler.has_work and self._in_flight is None:
            futures = [compiled for _, compiled in self._compiling.values()]
            wait_for(futures, _COMPILE_WAIT_S, return_when=FIRST_COMPLETED)
        outputs = []
        for request_id, (request, compiled) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[request_id]
            refused = self._add_compiled(request, compiled)
            if refused is not None:
                del self._times[request_id]
                outputs.append(refused)
        return outputs

    def _wrong_token_id(self, message: Submit) -> str | None:
        given: tuple[tuple[str, Collection[int]], ...] = (
            ("prompt", message.prompt_token_ids),
            ("logit_bias", message.sampling.logit_bias),
        )
        vocab_size = self._runner.vocab_size
        for name, token_ids in given:
            for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
                if not 0 <= token_id < vocab_size:
                    return (
                        f"{name} has token id {shorten(token_id)}; "
                        f"the model has ids 0 to {vocab_size - 1}"
                    )
        return None

    def _launch(self, plan: Plan) -> StepResultHandle:
        try:
            return self._runner.launch(plan)
        except Exception as error:  # told when the step's turn comes
            return _NotLaunched(error)

    def _commit(self, done: _InFlight) -> list[TokenOutput]:
        try:
            result = done.handle.wait()
        except Exception as error:  # whatever it is, it is that step's
            return self._recover(done, error)
        self._num_failed_steps = 0
        now = self._clock()
        # It began when it was launched, or behind the step that ran by then.
        self._step_s = now - max(done.launched_s, self._last_commit)
        self._step_tokens = done.plan.num_tokens
        self._scheduler.observe(self._step_tokens, self._step_s)
        self._step_prefill = {
            chunk.request.request_id: chunk.num_tokens
            for chunk in done.plan.chunks
            if chunk.num_tokens - len(chunk.drafts) > 1
            or chunk.start < len(chunk.request.prompt_token_ids)
        }
        self._step_drafts = {
            chunk.request.request_id: len(chunk.drafts)
            for chunk in done.plan.chunks
            if chunk.drafts
        }
        self._busy_s += self._step_s
        self._last_commit = now
        self._num_steps += 1
        return self._outputs(done.plan, result, now)

    def _recover(self, failed: _InFlight, error: Exception) -> list[TokenOutput]:
        self._num_failed_steps += 1
        logger.error(
            "a step of %d tokens failed, %d in a row; it computed %s",
            failed.plan.num_tokens,
            self._num_failed_steps,
            ", ".join(
                f"{c.request.request_id} (tokens {c.start} to {c.start + c.num_tokens})"
                for c in failed.plan.chunks
            ),
            exc_info=error,
        )
        later, self._in_flight = self._in_flight, None
        if later is not None:
            with suppress(Exception):
                later.handle.wait()  # from here on nothing runs on the device
        ended = self._scheduler.give_up(failed.plan, None if later is None else later.plan)
        told = f"the engine's step failed: {type(error).__name__}; its log tells more"
        outputs = [self._output(r, [], [], FinishReason.ERROR, told) for r in ended]
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineError(
                f"{self._num_failed_steps} steps in a row failed, the last with: {error}"
            ) from error
        return outputs

    def _outputs(self, plan: Plan, result: StepResult, now: float) -> list[TokenOutput]:
        outputs = self._take_scores(plan, result) if plan.scored else []
        if plan.embedded:
            outputs += self._take_embeddings(plan, result)
        for committed in self._scheduler.commit(plan, result.tokens):
            request, tokens, reason = committed.request, committed.tokens, committed.finish_reason
            end = committed.first_draw + len(tokens)
            is_failed = reason is FinishReason.ERROR
            if tokens:
                times = self._times[request.request_id]
                is_first = times.first_token is None
                if is_first:
                    times.first_token = now
                    self._count_prompt(request)
                logprobs = [
                    TokenLogprobs(*row)
                    for row in result.logprobs[committed.first_draw : end]
                    if row is not None
                ]
                outputs.append(
                    self._output(
                        request,
                        tokens,
                        logprobs,
                        None if is_failed else reason,
                        is_first=is_first,
                    )
                )
            if is_failed:
                outputs.append(self._output(request, [], [], reason, result.failures[end]))
        return outputs

    def _take_scores(self, plan: Plan, result: StepResult) -> list[TokenOutput]:
        """Keep what the step tells of prompts; return the last outputs of those that end by it."""
        outputs = []
        for span, scores in zip(plan.scored, result.prompt_logprobs, strict=True):
            request = span.request
            if request.finish_reason is not None:
                continue  # it ended while the step ran
            if scores is None:
                self._scheduler.fail(request)
                outputs.append(self._output(request, [], [], FinishReason.ERROR, _NOT_FINITE))
                continue
            self._scores.setdefault(request.request_id, []).append(scores)
            if span.is_end:
                self._count_prompt(request)
                self._scheduler.abort(request.request_id, FinishReason.LENGTH)
                outputs.append(self._output(request, [], [], FinishReason.LENGTH))
        return outputs

    def _take_embeddings(self, plan: Plan, result: StepResult) -> list[TokenOutput]:
        """Return the last outputs of the requests that the step embeds."""
        outputs = []
        for chunk, embedding in zip(plan.embedded, result.embeddings, strict=True):
            request = chunk.request
            if request.finish_reason is not None:
                continue  # it ended while the step ran
            if embedding is None:
                self._scheduler.fail(request)
                outputs.append(self._output(request, [], [], FinishReason.ERROR, _NO_EMBEDDING))
                continue
            self._count_prompt(request)
            self._scheduler.abort(request.request_id, FinishReason.LENGTH)
            output = self._output(request, [], [], FinishReason.LENGTH)
            outputs.append(replace(output, embedding=embedding))
        return outputs

    def _count_prompt(self, request: Request) -> None:
        self._num_prompt_tokens += len(request.prompt_token_ids)
        self._num_cached_prompt_tokens += request.num_cached_tokens or 0

    def _output(
        self,
        request: Request,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        finish_reason: FinishReason | None,
        error: str | None = None,
        *,
        is_first: bool = False,
    ) -> TokenOutput:
        cached = request.num_cached_tokens or 0
        is_last = finish_reason is not None
        if not is_first and not is_last:
            return TokenOutput(
                request_id=request.request_id,
                token_ids=token_ids,
                logprobs=logprobs,
                num_cached_tokens=cached,
            )
        times = self._times.pop(request.request_id) if is_last else self._times[request.request_id]
        scores = self._scores.pop(request.request_id, None)
        is_whole = finish_reason not in (FinishReason.ERROR, FinishReason.ABORT)
        now = self._clock()
        admitted = times.admitted or now
        first_token = times.first_token or now
        return TokenOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=PromptLogprobs.joined(scores) if scores and is_whole else None,
            finish_reason=finish_reason,
            error=error,
            num_cached_tokens=cached,
            num_preemptions=request.num_preemptions,
            queue_s=admitted - times.submitted,
            prefill_s=first_token - admitted,
            decode_s=now - first_token if is_last else None,
        )


def _why_unusable(compiled: Future[Grammar]) -> str | None:
    error = compiled.exception()
    return str(error) if error is not None else compiled.result().failure


def _refusal(message: Submit | Request, reason: str) -> TokenOutput:
    return TokenOutput(
        request_id=message.request_id,
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        error=reason,
    )
