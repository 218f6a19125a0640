"""What one request adds to the metrics and to the traces."""

import time
from collections.abc import Callable

from bitwatt.engine.messages import TokenOutput
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.metrics import ModelMetrics
from bitwatt.telemetry.tracing import trace_generation

__all__ = ["RequestMetrics"]


class RequestMetrics:
    """One request's times, observed as it runs."""

    __slots__ = (
        "_arrival_s",
        "_clock",
        "_first_token_s",
        "_last_token_s",
        "_model",
        "_observe_latency",
        "num_tokens",
    )

    def __init__(
        self, model: ModelMetrics, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model = model
        self._observe_latency = model[declared.INTER_TOKEN_LATENCY].observe  # once a token
        self._clock = clock
        self._arrival_s = clock()
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self.num_tokens = 0

    def on_output(self, output: TokenOutput) -> None:
        """Observe an output of the engine."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = self._clock()
        if self.num_tokens:
            latency_s = (now - self._last_token_s) / num_tokens
            for _ in range(num_tokens):
                self._observe_latency(latency_s)
        else:
            self._first_token_s = now
            self._model[declared.TIME_TO_FIRST_TOKEN].observe(now - self._arrival_s)
        self._last_token_s = now
        self.num_tokens += num_tokens

    def on_end(self, reason: str, num_prompt_tokens: int, last: TokenOutput | None) -> None:
        """Observe the request's end; last is the engine's last output, if it came so far."""
        model = self._model
        model.on_ended(reason)
        model[declared.REQUEST_PROMPT_TOKENS].observe(num_prompt_tokens)
        model[declared.REQUEST_GENERATION_TOKENS].observe(self.num_tokens)
        duration_s = self._clock() - self._arrival_s
        model[declared.E2E_LATENCY].observe(duration_s)
        first = self._first_token_s
        trace_generation(
            model.name,
            duration_s=duration_s,
            time_to_first_token_s=None if first is None else first - self._arrival_s,
            queue_s=None if last is None else last.queue_s,
            finish_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=self.num_tokens,
        )
        if last is None or last.decode_s is None:
            return
        prefill_s = last.prefill_s or 0.0
        model[declared.QUEUE_TIME].observe(last.queue_s or 0.0)
        model[declared.PREFILL_TIME].observe(prefill_s)
        model[declared.DECODE_TIME].observe(last.decode_s)
        model[declared.INFERENCE_TIME].observe(prefill_s + last.decode_s)
        if self.num_tokens > 1:
            model[declared.TIME_PER_OUTPUT_TOKEN].observe(last.decode_s / (self.num_tokens - 1))
