"""Runs the choices of one request: engine's tokens in, text out."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from bitwatt.engine.messages import Submit, TokenLogprobs, TokenOutput
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError
from bitwatt.scheduling.request import FinishReason
from bitwatt.serving.models import ServedModel
from bitwatt.serving.usage import PromptTokensDetails, Usage
from bitwatt.telemetry.energy.ledger import RequestEnergy, total_energy
from bitwatt.telemetry.request_metrics import RequestMetrics

__all__ = ["Delta", "Deltas", "FinishReasonName", "Generation"]

FinishReasonName = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a choice: text that is certain, and its tokens where they were asked for.

    token_ids, logprobs  empty unless the request asked for log-probabilities
    finish_reason        with the choice's last delta
    """

    index: int
    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReasonName | None = None


Deltas = AsyncGenerator[Delta, None]


@dataclass(slots=True)
class _Tally:
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    energy: list[RequestEnergy] = field(default_factory=list)  # of choices that ended


@dataclass(slots=True, kw_only=True)
class Generation:
    """The choices of one request, to be run once.

    submits  one a choice: n to a prompt, prompt after prompt
    watch    stands between stream and whoever reads it, if given
    """

    model: ServedModel
    submits: list[Submit]
    stops: tuple[str, ...]
    num_choices: int  # to a prompt
    watch: Callable[[Deltas], Deltas] | None = None
    _tally: _Tally = field(default_factory=_Tally)

    def stream(self) -> Deltas:
        """Yield what is new, in order for each choice. Closing it aborts what still runs.

        Raises  QueueFullError, EngineUnavailableError, RequestFailedError
        """
        choices = [self._stream_choice(index) for index in range(len(self.submits))]
        deltas = choices[0] if len(choices) == 1 else _merge(choices)
        return deltas if self.watch is None else self.watch(deltas)

    async def collect(self) -> list[Delta]:
        """Return every choice whole. Raises as stream does; cancelling it aborts what runs."""
        parts: list[list[Delta]] = [[] for _ in self.submits]
        async with aclosing(self.stream()) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        return [
            Delta(
                index,
                "".join(delta.text for delta in deltas_of_choice),
                [i for delta in deltas_of_choice for i in delta.token_ids],
                [entry for delta in deltas_of_choice for entry in delta.logprobs],
                deltas_of_choice[-1].finish_reason,
            )
            for index, deltas_of_choice in enumerate(parts)
        ]

    @property
    def usage(self) -> Usage:
        """The tokens used so far. A prompt counts once, however many choices it has."""
        prompt_tokens = sum(
            len(submit.prompt_token_ids) for submit in self.submits[:: self.num_choices]
        )
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._tally.completion_tokens,
            total_tokens=prompt_tokens + self._tally.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._tally.cached_tokens.values())),
            bitwatt=total_energy(self._tally.energy),
        )

    async def _stream_choice(self, index: int) -> Deltas:
        submit = self.submits[index]
        model, tally = self.model, self._tally
        text = model.text.output(self.stops)
        metrics = RequestMetrics(model.metrics)
        model.energy.open(submit.request_id)
        wants_logprobs = submit.sampling.logprobs is not None
        waiting_ids: list[int] = []  # with their logprobs: tokens whose text is held back
        waiting: list[TokenLogprobs] = []
        output: TokenOutput | None = None
        ended = "abort"
        try:
            async with aclosing(model.engine.submit(submit)) as outputs:
                async for output in outputs:
                    token_ids: Sequence[int] = output.token_ids
                    num_tokens = len(token_ids)
                    metrics.on_output(output)
                    reason = output.finish_reason
                    if reason is None:
                        new = text.push(token_ids)
                    else:
                        _raise_if_failed(output)
                        token_ids = _without_stop_token(submit, output)
                        new = text.push(token_ids) + text.finish()
                    finish: FinishReasonName | None = None
                    if text.stopped:
                        finish = "stop"
                        token_ids = token_ids[: len(token_ids) - text.num_unused]
                        num_tokens = len(token_ids)
                    elif reason is not None:
                        finish = "stop" if reason is FinishReason.STOP else "length"
                    tally.completion_tokens += num_tokens
                    if wants_logprobs:
                        waiting_ids += token_ids
                        waiting += output.logprobs[: len(token_ids)]
                    if finish is None:
                        if new:
                            yield Delta(index, new, waiting_ids, waiting)
                            if wants_logprobs:
                                waiting_ids, waiting = [], []
                        continue
                    ended = finish
                    cached, prompt = tally.cached_tokens, index // self.num_choices
                    cached[prompt] = max(cached.get(prompt, 0), output.num_cached_tokens)
                    yield Delta(index, new, waiting_ids, waiting, finish)
                    return
            raise RequestFailedError("the engine ended the request without an end")
        except (QueueFullError, EngineUnavailableError) as error:
            ended = "rejected"
            is_full = isinstance(error, QueueFullError)
            model.metrics.on_rejected("queue_full" if is_full else "unavailable")
            raise
        except RequestFailedError:
            ended = "error"
            raise
        finally:
            tally.energy.append(model.energy.close(submit.request_id))
            if ended != "rejected":
                metrics.on_end(ended, len(submit.prompt_token_ids), output)


def _raise_if_failed(output: TokenOutput) -> None:
    if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise RequestFailedError(output.error or "the engine gave the request up")


def _without_stop_token(submit: Submit, output: TokenOutput) -> Sequence[int]:
    """Return the tokens that are text: a stop token ends the text and is no part of it."""
    token_ids = output.token_ids
    if (
        output.finish_reason is FinishReason.STOP
        and token_ids
        and token_ids[-1] in submit.sampling.stop_token_ids
    ):
        return token_ids[:-1]
    return token_ids


async def _merge(streams: Sequence[Deltas]) -> Deltas:
    """Yield what the streams bring, as it comes; the first error ends all of them."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(stream: Deltas) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
