"""Runs the choices of one request: an engine's tokens in, text out."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from bitwatt.engine.messages import PromptLogprobs, Submit, TokenOutput
from bitwatt.errors import EngineUnavailableError, QueueFullError, RequestFailedError
from bitwatt.serving.answers import AnswerPlan, new_reader
from bitwatt.serving.choice import ChoiceReader, Delta
from bitwatt.serving.models import ServedModel
from bitwatt.serving.usage import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Took,
    Usage,
    took,
)
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.energy.ledger import RequestEnergy, total_energy
from bitwatt.telemetry.request_metrics import ChoiceTimes, RequestMetrics

__all__ = ["Deltas", "Generation"]

Deltas = AsyncGenerator[Delta, None]


@dataclass(slots=True, kw_only=True)
class Generation:
    """The choices of one request, to be run once.

    submits      one a choice: num_choices to a prompt, prompt after prompt
    num_choices  choices to a prompt
    lists_stop_tokens  as ChoiceReader has it
    answers      one to a prompt, by which its choices are read; None reads none
    tap          wraps the stream on its way to the reader, to see what passes; None lets it be
    """

    model: ServedModel
    submits: list[Submit]
    stops: tuple[str, ...]
    num_choices: int
    lists_stop_tokens: bool = False
    answers: Sequence[AnswerPlan] | None = None
    tap: Callable[[Deltas], Deltas] | None = None
    _cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    _num_tokens: dict[int, list[int]] = field(default_factory=dict)  # of ended choices, by prompt
    _prompt_logprobs: dict[int, PromptLogprobs | None] = field(default_factory=dict)  # by prompt
    _embeddings: dict[int, bytes] = field(default_factory=dict)  # by choice
    _are_scored: dict[int, asyncio.Event] = field(  # by prompt
        default_factory=lambda: defaultdict(asyncio.Event)
    )
    _energy: list[RequestEnergy] = field(default_factory=list)  # of choices that ended
    _times: dict[int, ChoiceTimes | None] = field(default_factory=dict)  # of those, by choice
    _is_rejected: bool = False
    _readers: list[ChoiceReader] = field(init=False)

    def __post_init__(self) -> None:
        self._readers = [self._new_reader(*numbered) for numbered in enumerate(self.submits)]

    def _new_reader(self, index: int, submit: Submit) -> ChoiceReader:
        return new_reader(
            index,
            submit,
            self.model.text.codec,
            self.stops,
            None if self.answers is None else self.answers[index // self.num_choices],
            lists_stop_token=self.lists_stop_tokens,
        )

    def stream(self) -> Deltas:
        """Yield what is new, in order for each choice. Closing it aborts what still runs.

        Raises  QueueFullError, EngineUnavailableError, RequestFailedError
        """
        choices = [self._stream_choice(index) for index in range(len(self.submits))]
        deltas = choices[0] if len(choices) == 1 else self._stream_together(choices)
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
                deltas_of_choice[-1].stop_string,
                [piece for delta in deltas_of_choice for piece in delta.told],
            )
            for index, deltas_of_choice in enumerate(parts)
        ]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompts are scored; then they are before a choice's first delta comes."""
        return self.submits[0].sampling.prompt_logprobs is not None

    def prompt_logprobs(self, index: int) -> PromptLogprobs | None:
        """Return those of a choice's prompt; None where it is one token, or they aren't wanted."""
        return self._prompt_logprobs.get(index // self.num_choices)

    def embedding(self, index: int) -> bytes | None:
        """Return that of a choice's prompt, as TokenOutput has it; None where it isn't wanted."""
        return self._embeddings.get(index)

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
            completion_tokens_details=self._details(self._readers),
            bitwatt=self._took(
                total_energy(self._energy),
                [self._times.get(index) for index in range(len(self.submits))],
            ),
        )

    def usage_of(self, index: int, *, is_opening: bool = False) -> Usage:
        """Return the tokens that one choice has used so far; its joules are known at the end.

        is_opening  of what comes before its first token
        """
        prompt_tokens = len(self.submits[index].prompt_token_ids)
        completion_tokens = 0 if is_opening else self._readers[index].num_tokens
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                self._cached_tokens.get(index // self.num_choices, 0)
            ),
            completion_tokens_details=self._details([] if is_opening else [self._readers[index]]),
            bitwatt=self._took(RequestEnergy(reason="the request runs")),
        )

    def _details(self, readers: Sequence[ChoiceReader]) -> CompletionTokensDetails | UnsetType:
        if self.answers is None:
            return UNSET
        return CompletionTokensDetails(sum(reader.num_thinking_tokens for reader in readers))

    def _took(self, energy: RequestEnergy, times: Sequence[ChoiceTimes | None] = ()) -> Took:
        info = self.model.engine.info
        return took(energy, None if info is None else info.fallback, times)

    async def _stream_together(self, choices: Sequence[Deltas]) -> Deltas:
        """Yield what the choices bring, once all of them have their place: none begins before."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self.model.engine.places(self.submits))
            except (QueueFullError, EngineUnavailableError) as error:
                self._count_rejection(error)
                raise
            async with aclosing(_merge(choices)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _stream_choice(self, index: int) -> Deltas:
        submit, reader = self.submits[index], self._readers[index]
        read = reader.read
        model = self.model
        metrics = RequestMetrics(model.metrics)
        model.energy.open(submit.request_id)
        model.callers.arrive()
        output: TokenOutput | None = None
        ended = "abort"
        try:
            async with aclosing(model.engine.submit(submit)) as outputs:
                async for output in outputs:
                    metrics.on_output(output)
                    if not reader.num_tokens:
                        cached, prompt = self._cached_tokens, index // self.num_choices
                        cached[prompt] = max(cached.get(prompt, 0), output.num_cached_tokens)
                        if self.wants_prompt_logprobs and output.error is None:
                            await self._scores_of(index, output)
                    if output.embedding is not None:
                        self._embeddings[index] = output.embedding
                    delta = read(output)
                    if delta is None:
                        continue
                    if delta.finish_reason is None:
                        yield delta
                        continue
                    ended = delta.finish_reason
                    yield delta
                    return
            raise RequestFailedError("the engine ended the request without an end")
        except (QueueFullError, EngineUnavailableError) as error:
            ended = "rejected"
            self._count_rejection(error)
            raise
        except RequestFailedError:
            ended = "error"
            raise
        finally:
            model.callers.leave()
            energy = model.energy.close(submit.request_id)
            self._energy.append(energy)
            if ended != "rejected":
                self._times[index] = metrics.on_end(
                    ended,
                    submit,
                    output,
                    num_tokens=reader.num_tokens,
                    energy=energy,
                    num_choices=self.num_choices,
                    counts_prompt=index % self.num_choices == 0,
                )
                self._observe_end(index // self.num_choices, reader.num_tokens)

    def _observe_end(self, prompt: int, num_tokens: int) -> None:
        """Note that a choice ended; with its prompt's last, observe what vLLM calls a request."""
        ended = self._num_tokens.setdefault(prompt, [])
        ended.append(num_tokens)
        if len(ended) == self.num_choices:
            self.model.metrics[declared.REQUEST_N].observe(self.num_choices)
            self.model.metrics[declared.REQUEST_LONGEST_CHOICE].observe(max(ended))

    async def _scores_of(self, index: int, first: TokenOutput) -> None:
        """Keep what a prompt's first choice brings; the others wait for it."""
        prompt, choice = divmod(index, self.num_choices)
        if choice:
            await self._are_scored[prompt].wait()
        else:
            self._prompt_logprobs[prompt] = first.prompt_logprobs
            self._are_scored[prompt].set()

    def _count_rejection(self, error: QueueFullError | EngineUnavailableError) -> None:
        if not self._is_rejected:  # several choices may be, of one request
            self._is_rejected = True
            is_full = isinstance(error, QueueFullError)
            self.model.metrics.on_rejected("queue_full" if is_full else "unavailable")


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
