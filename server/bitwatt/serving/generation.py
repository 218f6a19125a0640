"""Runs the choices of one request: an engine's tokens in, text out."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError
from bitwatt.serving.choice import ChoiceReader, Delta
from bitwatt.serving.models import ServedModel
from bitwatt.serving.usage import PromptTokensDetails, Usage
from bitwatt.telemetry.energy.ledger import RequestEnergy, total_energy
from bitwatt.telemetry.request_metrics import RequestMetrics

__all__ = ["Deltas", "Generation"]

Deltas = AsyncGenerator[Delta, None]


@dataclass(slots=True, kw_only=True)
class Generation:
    """The choices of one request, to be run once.

    submits      one a choice: num_choices to a prompt, prompt after prompt
    num_choices  choices to a prompt
    tap          wraps the stream on its way to the reader, to see what passes; None lets it be
    """

    model: ServedModel
    submits: list[Submit]
    stops: tuple[str, ...]
    num_choices: int
    tap: Callable[[Deltas], Deltas] | None = None
    _cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    _energy: list[RequestEnergy] = field(default_factory=list)  # of choices that ended
    _is_rejected: bool = False
    _readers: list[ChoiceReader] = field(init=False)

    def __post_init__(self) -> None:
        output = self.model.text.output
        self._readers = [
            ChoiceReader(index, submit, output(self.stops, min_tokens=submit.sampling.min_tokens))
            for index, submit in enumerate(self.submits)
        ]

    def stream(self) -> Deltas:
        """Yield what is new, in order for each choice. Closing it aborts what still runs.

        Raises  QueueFullError, EngineUnavailableError, RequestFailedError
        """
        choices = [self._stream_choice(index) for index in range(len(self.submits))]
        deltas = choices[0] if len(choices) == 1 else _merge(choices)
        return deltas if self.tap is None else self.tap(deltas)

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
        completion_tokens = sum(reader.num_tokens for reader in self._readers)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens.values())),
            bitwatt=total_energy(self._energy),
        )

    async def _stream_choice(self, index: int) -> Deltas:
        submit, read = self.submits[index], self._readers[index].read
        model = self.model
        metrics = RequestMetrics(model.metrics)
        model.energy.open(submit.request_id)
        output: TokenOutput | None = None
        ended = "abort"
        try:
            async with aclosing(model.engine.submit(submit)) as outputs:
                async for output in outputs:
                    metrics.on_output(output)
                    delta = read(output)
                    if delta is None:
                        continue
                    if delta.finish_reason is None:
                        yield delta
                        continue
                    ended = delta.finish_reason
                    cached, prompt = self._cached_tokens, index // self.num_choices
                    cached[prompt] = max(cached.get(prompt, 0), output.num_cached_tokens)
                    yield delta
                    return
            raise RequestFailedError("the engine ended the request without an end")
        except (QueueFullError, EngineUnavailableError) as error:
            ended = "rejected"
            if not self._is_rejected:  # several choices may be, of one request
                self._is_rejected = True
                is_full = isinstance(error, QueueFullError)
                model.metrics.on_rejected("queue_full" if is_full else "unavailable")
            raise
        except RequestFailedError:
            ended = "error"
            raise
        finally:
            self._energy.append(model.energy.close(submit.request_id))
            if ended != "rejected":
                metrics.on_end(ended, len(submit.prompt_token_ids), output)


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
