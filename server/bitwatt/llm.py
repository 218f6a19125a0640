"""The engine without a server, for Python users: batches prompts in this process."""

import logging
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, get_args

from bitwatt import builtin
from bitwatt.constraints.compiling import refused, written_for_matcher
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import (
    EngineConfig,
    EngineInfo,
    PromptLogprobs,
    Submit,
    TokenLogprobs,
    TokenOutput,
    merged,
)
from bitwatt.errors import (
    CheckpointError,
    ConfigurationError,
    EngineUnavailableError,
    InvalidRequestError,
    shorten,
)
from bitwatt.hub import fetch
from bitwatt.model.config import Dtype, HeadBits, KVCacheDtype, WeightsName, weights_named
from bitwatt.model.folder import why_no_folder
from bitwatt.scheduling.drafting import Speculation
from bitwatt.serving.choice import ChoiceReader, FinishReasonName
from bitwatt.serving.planning import plan_choices, seed_of
from bitwatt.serving.sampling_params import GenerationConfig, SamplingParams, checked_defaults
from bitwatt.text.codec import TextCodec

__all__ = ["LLM", "Answer", "Choice", "PromptTokenLogprobs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptTokenLogprobs:
    """A prompt's token by its natural-log probability, given those before it.

    rank  1 for the likeliest
    top   the likeliest tokens, best first
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt.

    text       of the tokens, special tokens and the stop string left out
    token_ids  with the stop token that ended it, if one did
    logprobs   as many as token_ids where they were asked for, else empty
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReasonName
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt or conversation brought: SamplingParams.n choices, the first one's at hand.

    num_cached_tokens  of the prompt's, found in the prefix cache
    prompt_logprobs    as many as prompt_token_ids where they were asked for, the first one None;
                       else empty
    """

    prompt_token_ids: list[int]
    choices: list[Choice]
    num_cached_tokens: int
    prompt_logprobs: list[PromptTokenLogprobs | None]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReasonName:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self.choices[0].logprobs


class LLM:
    """A model loaded into this process; close it, or use it as a context.

    Threads may share it: their calls run one after the other, and close() after them, for the
    engine runs one batch at a time. Prompts given to one call run together.

    with LLM("path/to/folder") as llm:
        [answer] = llm.generate(["def main():"], SamplingParams(max_tokens=32))

    info  what the engine says of itself
    """

    info: EngineInfo

    def __init__(
        self,
        model: str | Path = "builtin",
        *,
        weights: WeightsName = "ternary",
        device: str = "auto",
        backend: str | None = None,
        dtype: Dtype = "bfloat16",
        batch_invariant: bool = False,
        num_threads: int | None = None,
        cpu_isa: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        gpu_memory_utilization: float = 0.9,
        prefix_caching: bool = True,
        speculate: Speculation = "off",
        head_bits: HeadBits = 16,
        quantize: bool = False,
        generation_config: GenerationConfig = "auto",
    ) -> None:
        """Load a model; the knobs are those of `bitwatt serve`, in docs/settings.md.

        model  the path of a folder as on Hugging Face, or of a GGUF file; or a text
               ORG/NAME[:FILE][@REVISION], a model of the hub, if no path is so called; "builtin" is
               the embedded ternary model, if no folder is

        Raises  CheckpointError, HubError, ConfigurationError or EngineStartError, with reason and
                knob
        """
        if not isinstance(model, str | Path):
            raise ConfigurationError(
                f"model is {shorten(model)}; it must be a folder's path, or ORG/NAME of the hub"
            )
        is_builtin = str(model) == "builtin" and not Path(model).exists()
        path = builtin.TERNARY if is_builtin else fetch(model)
        if reason := why_no_folder(path):
            raise CheckpointError(f"{path} {reason}")
        self._is_closed = False
        self._turn = threading.Lock()
        self._holder: int | None = None  # the thread whose turn it is
        if generation_config not in get_args(GenerationConfig):
            raise ConfigurationError(
                f"generation_config is {shorten(generation_config)}; it must be auto or none "
                "(--generation-config)"
            )
        self._codec = TextCodec.from_folder(path)
        self._sampling_defaults: Mapping[str, Any] = checked_defaults(
            self._codec.sampling_defaults, path, generation_config
        )
        self._core, self.info = build_engine(
            EngineConfig(
                model_path=str(path),
                weights=weights_named(weights),
                device=device,
                backend=backend,
                dtype=dtype,
                batch_invariant=batch_invariant,
                num_threads=num_threads,
                cpu_isa=cpu_isa,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_bytes=kv_cache_bytes,
                kv_cache_dtype=kv_cache_dtype,
                gpu_memory_utilization=gpu_memory_utilization,
                prefix_caching=prefix_caching,
                speculate=speculate,
                head_bits=head_bits,
                quantize=quantize,
            )
        )
        for notice in (
            *self.info.notices,
            *self._codec.vocabulary.notices_for(self.info.vocab_size),
        ):
            logger.warning("%s: %s", path, notice)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what generate() and chat() take for None: what the model's files recommend."""
        return SamplingParams(**self._sampling_defaults)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> list[Answer]:
        """Return one answer a prompt, in order; prompts run as one batch.

        An interrupt, as Ctrl-C, gives up what runs; the model is as usable as before.

        prompts          a text, or several texts or lists of token ids
        sampling_params  one for all, or one each; None is get_default_sampling_params()
        on_progress      called as choices end, with how many have and how many there are: a bar is
                         a call of one's own library from here

        Raises  InvalidRequestError before anything runs, RequestFailedError;
                EngineUnavailableError after close()
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        _check_list("prompts", given, "a text, or a list of texts or of lists of token ids")
        ids = [self._encode(prompt) for prompt in given]
        return self._answer(ids, sampling_params, "prompts", on_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, bool] | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> list[Answer]:
        """Return one answer a conversation, in order, as the model's chat template puts them.

        messages              of one conversation, or of several: mappings with role and content
        chat_template_kwargs  enable_thinking, thinking
        on_progress           as generate()'s

        Raises  InvalidRequestError before anything runs, also where there is no chat template;
                RequestFailedError; EngineUnavailableError after close()
        """
        _check_list("messages", messages, "a list of messages, or of such lists")
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise InvalidRequestError(
                f"chat_template_kwargs is {shorten(chat_template_kwargs)}; it must be a mapping",
                param="chat_template_kwargs",
            )
        is_one = all(isinstance(message, Mapping) for message in messages)
        conversations: Sequence[Any] = [messages] if is_one else messages
        prompts = []
        for conversation in conversations:
            _check_messages(conversation)
            prompts.append(
                self._codec.encode_chat(
                    conversation,
                    kwargs=chat_template_kwargs,
                    max_tokens=self.info.max_model_len,
                )
            )
        return self._answer(prompts, sampling_params, "messages", on_progress)

    def close(self) -> None:
        """Release the model; the second time, do nothing."""
        with self._turn_of_this_thread():
            if not self._is_closed:
                self._is_closed = True
                self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._codec.encode(prompt, max_tokens=self.info.max_model_len, param="prompts")
        is_ids = isinstance(prompt, list | tuple) and all(
            type(token_id) is int and token_id >= 0 for token_id in prompt
        )
        if not is_ids:
            raise InvalidRequestError(
                f"a prompt is a text or a list of token ids, not {shorten(prompt)}",
                param="prompts",
            )
        return list(prompt)

    def _answer(
        self,
        prompts: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        param: str,
        on_progress: Callable[[int, int], object] | None,
    ) -> list[Answer]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            given = sampling_params or self.get_default_sampling_params()
            sampling_params = [given] * len(prompts)
        _check_list("sampling_params", sampling_params, "SamplingParams, or a list of them")
        for index, params in enumerate(sampling_params):
            if not isinstance(params, SamplingParams):
                raise InvalidRequestError(
                    f"sampling_params[{index}] is {shorten(params)}; it must be SamplingParams",
                    param="sampling_params",
                )
        if len(sampling_params) != len(prompts):
            raise InvalidRequestError(
                f"there are {len(prompts)} {param} and {len(sampling_params)} sampling parameters",
                param="sampling_params",
            )
        name = secrets.token_hex(4)
        pending = []
        for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            submits = plan_choices(
                params,
                self.info,
                [prompt],
                request_id=f"{name}-{number}",
                seed=seed_of(params),
                grammar=self._grammar_of(params),
                prompt_param=param,
            )
            pending.append([_Pending(submit, self._codec, params) for submit in submits])
        with self._turn_of_this_thread():
            if self._is_closed:
                raise EngineUnavailableError("the model was released by close()")
            self._run({p.submit.request_id: p for choices in pending for p in choices}, on_progress)
        return [
            Answer(
                choices[0].submit.prompt_token_ids,
                [choice.settled() for choice in choices],
                max(choice.num_cached_tokens for choice in choices),
                choices[0].prompt_logprobs(),
            )
            for choices in pending
        ]

    @contextmanager
    def _turn_of_this_thread(self) -> Iterator[None]:
        """Wait until no other thread uses the engine, and let none while the block runs.

        Raises  InvalidRequestError where this thread already does, for it would wait for ever
        """
        if self._holder == threading.get_ident():
            raise InvalidRequestError(
                "on_progress can't use the model that it is called by", param="on_progress"
            )
        with self._turn:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _grammar_of(self, params: SamplingParams) -> str | None:
        """Return the grammar of what is asked, once the engine has it compiled."""
        if params.structured_outputs is None:
            return None
        source = params.structured_outputs.source()
        grammar = written_for_matcher(source)
        if not self._core.knows_tokens:
            self._core.learn_tokens(self._codec.vocabulary.for_grammars())
        if reason := self._core.why_no_grammar(grammar):
            raise refused(source, reason)
        return grammar

    def _run(
        self,
        pending: dict[str, "_Pending"],
        on_progress: Callable[[int, int], object] | None,
    ) -> None:
        """Run every choice to its end; whatever goes wrong, none is left in the engine."""
        unfinished = set(pending)
        with _interrupts_held() as release_interrupt:
            try:
                for choice in pending.values():
                    only = self._core.submit(choice.submit)
                    if only is None:
                        continue
                    if only.error is not None:
                        raise InvalidRequestError(only.error)
                    choice.read(only)
                    unfinished.discard(only.request_id)
                while unfinished:
                    release_interrupt()
                    assert self._core.has_work, "a request ends in exactly one output"
                    for output in self._core.step():
                        name = output.request_id
                        if name not in unfinished:
                            continue  # its last tokens were under way when a stop string ended it
                        if pending[name].read(output):
                            unfinished.discard(name)
                            if output.finish_reason is None:
                                self._core.abort([name])
                            if on_progress is not None:
                                on_progress(len(pending) - len(unfinished), len(pending))
            finally:
                self._core.abort(sorted(unfinished))


@contextmanager
def _interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the value is called: a step that it breaks off loses its tokens.

    The second Ctrl-C is not held: a step may hang. Nothing is held in other threads than the main
    one, which get no signals, nor where the program has a handler of its own.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours:
        yield lambda: None
        return
    is_interrupted = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            signal.default_int_handler(number, frame)
        is_interrupted = True

    def release() -> None:
        if is_interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hold)
    try:
        yield release
        release()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Pending:
    """A choice while it runs."""

    def __init__(self, submit: Submit, codec: TextCodec, params: SamplingParams) -> None:
        self.submit = submit
        self.num_cached_tokens = 0
        text = codec.output(params.stop_strings, min_tokens=params.min_tokens)
        self._reader = ChoiceReader(0, submit, text)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReasonName | None = None
        self._prompt_logprobs: PromptLogprobs | None = None
        # Only a stop string must be seen at once; all else is read when the engine has ended the
        # choice, for the next step would wait for this thread's Python.
        self._reads_at_once = bool(params.stop_strings)
        self._unread: list[TokenOutput] = []

    def read(self, output: TokenOutput) -> bool:
        """Take what is new; return whether that was the last. Raises RequestFailedError."""
        if not self._reads_at_once:
            self._unread.append(output)
            if output.finish_reason is None:
                return False
            output = merged(self._unread)
        before = self._reader.num_tokens
        delta = self._reader.read(output)
        num_new = self._reader.num_tokens - before
        self._token_ids += output.token_ids[:num_new]
        self._logprobs += output.logprobs[:num_new]
        self.num_cached_tokens = output.num_cached_tokens
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        if delta is None:
            return False
        self._texts.append(delta.text)
        self._finish_reason = delta.finish_reason
        return delta.finish_reason is not None

    def prompt_logprobs(self) -> list[PromptTokenLogprobs | None]:
        """Return them as Answer has them."""
        if self.submit.sampling.prompt_logprobs is None:
            return []
        packed = self._prompt_logprobs
        scored = [] if packed is None else packed.unpacked()
        return [None, *(PromptTokenLogprobs(*entry) for entry in scored)]

    def settled(self) -> Choice:
        assert self._finish_reason is not None
        return Choice("".join(self._texts), self._token_ids, self._finish_reason, self._logprobs)


def _check_list(name: str, value: object, words: str) -> None:
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name} is {shorten(value)}; it must be {words}", param=name)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages has no messages; one is needed", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not (
            isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        ):
            raise InvalidRequestError(
                f"messages[{index}] is {shorten(message)}; it must be a mapping whose role and "
                "content are strings",
                param=f"messages[{index}]",
            )
