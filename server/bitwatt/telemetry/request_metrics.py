"""What one request adds to the metrics and to the traces."""

import time
from collections.abc import Callable
from contextvars import ContextVar

import msgspec

from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.metrics import ModelMetrics
from bitwatt.telemetry.tracing import trace_generation

__all__ = ["ChoiceTimes", "RequestMetrics", "head_arrived_s"]

head_arrived_s: ContextVar[float | None] = ContextVar("head_arrived_s", default=None)
"""When the head of the HTTP request in hand came, by time.perf_counter; None outside one."""


class ChoiceTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one choice, to the microsecond, by the server's clocks: no late reader is in them.

    time_to_first_token_s  from the request's head to the first token drawn
    queue_s, prefill_s, decode_s  as in TokenOutput
    """

    time_to_first_token_s: float
    queue_s: float
    prefill_s: float
    decode_s: float


class RequestMetrics:
    """One choice's times, observed as it runs; they count from when the request's head came."""

    __slots__ = (
        "_arrival_s",
        "_began_s",
        "_clock",
        "_first",
        "_first_token_s",
        "_last_token_s",
        "_model",
        "_num_drawn",
        "_observe_latency",
    )

    def __init__(
        self, model: ModelMetrics, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model = model
        self._observe_latency = model[declared.INTER_TOKEN_LATENCY].observe  # once a token
        self._clock = clock
        arrived_s = head_arrived_s.get()
        self._began_s = clock()
        self._arrival_s = self._began_s if arrived_s is None else arrived_s
        self._first: TokenOutput | None = None
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._num_drawn = 0

    def on_output(self, output: TokenOutput) -> None:
        """Observe an output of the engine."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = self._clock()
        if self._num_drawn:
            latency_s = (now - self._last_token_s) / num_tokens
            for _ in range(num_tokens):
                self._observe_latency(latency_s)
        else:
            self._first = output
            self._first_token_s = now
            self._model[declared.TIME_TO_FIRST_TOKEN].observe(now - self._arrival_s)
        self._last_token_s = now
        self._num_drawn += num_tokens

    def on_end(
        self,
        reason: str,
        submit: Submit,
        last: TokenOutput | None,
        *,
        num_tokens: int,
        energy: RequestEnergy,
        num_choices: int = 1,
        counts_prompt: bool = True,
    ) -> ChoiceTimes | None:
        """Observe the choice's end; return its times, None where the engine told none.

        last           the engine's last output, if it came so far
        num_tokens     of the answer, as its usage counts them: the engine may have drawn more
        num_choices    of the prompt
        counts_prompt  whether this one of them tells the prompt's tokens in a trace
        """
        model = self._model
        num_prompt_tokens = len(submit.prompt_token_ids)
        model.on_ended(reason)
        model[declared.REQUEST_PROMPT_TOKENS].observe(num_prompt_tokens)
        model[declared.REQUEST_GENERATION_TOKENS].observe(num_tokens)
        model[declared.REQUEST_MAX_TOKENS].observe(submit.sampling.max_tokens)
        num_cached = 0 if last is None else last.num_cached_tokens
        model[declared.REQUEST_COMPUTED_TOKENS].observe(num_prompt_tokens - num_cached)
        told = last
        decode_s = None if last is None else last.decode_s
        if decode_s is None and reason == "stop" and self._first_token_s is not None:
            # A stop string: nobody waited for the engine's own end.
            told, decode_s = self._first, self._last_token_s - self._first_token_s
        duration_s = self._clock() - self._arrival_s
        model[declared.E2E_LATENCY].observe(duration_s)
        first_s = self._first_token_s
        trace_generation(
            model.name,
            submit,
            energy_joules=energy.energy_joules,
            usd_of_electricity=model.prices.usd_of_electricity(energy.energy_joules),
            num_choices=num_choices,
            duration_s=duration_s,
            time_to_first_token_s=None if first_s is None else first_s - self._arrival_s,
            queue_s=None if told is None else told.queue_s,
            finish_reason=reason,
            num_tokens=num_tokens,
            num_cached_tokens=num_cached,
            counts_prompt=counts_prompt,
        )
        if told is None or told.queue_s is None or told.prefill_s is None or decode_s is None:
            return None
        model[declared.REQUEST_PREEMPTIONS].observe(told.num_preemptions)
        queue_s, prefill_s = told.queue_s, told.prefill_s
        model[declared.QUEUE_TIME].observe(queue_s)
        model[declared.PREFILL_TIME].observe(prefill_s)
        model[declared.DECODE_TIME].observe(decode_s)
        model[declared.INFERENCE_TIME].observe(prefill_s + decode_s)
        if self._num_drawn > 1:
            model[declared.TIME_PER_OUTPUT_TOKEN].observe(decode_s / (self._num_drawn - 1))
        drawn_s = self._began_s - self._arrival_s + queue_s + prefill_s
        return ChoiceTimes(
            time_to_first_token_s=round(drawn_s, 6),
            queue_s=round(queue_s, 6),
            prefill_s=round(prefill_s, 6),
            decode_s=round(decode_s, 6),
        )
