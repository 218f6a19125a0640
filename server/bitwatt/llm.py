"""The engine without a server, for Python users: batches prompts in this process."""

import json
import logging
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, get_args

from bitwatt import builtin
from bitwatt.constraints.compiling import refused, written_for_matcher
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig, EngineInfo
from bitwatt.errors import (
    CheckpointError,
    ConfigurationError,
    EngineUnavailableError,
    InvalidRequestError,
    shorten,
)
from bitwatt.hub import fetch
from bitwatt.llm_results import Answer, Choice, PendingChoice, PromptTokenLogprobs
from bitwatt.model.config import Dtype, HeadBits, KVCacheDtype, WeightsName, weights_named
from bitwatt.model.folder import why_no_folder
from bitwatt.scheduling.drafting import Speculation
from bitwatt.serving.answers import AnswerOptions, plan_answer
from bitwatt.serving.message_content import text_of_content
from bitwatt.serving.planning import plan_choices, seed_of
from bitwatt.serving.response_format import outputs_of
from bitwatt.serving.sampling_params import GenerationConfig, SamplingParams, checked_defaults
from bitwatt.serving.tools import template_call, template_tools, tool_use_of
from bitwatt.text.codec import TextCodec

__all__ = ["LLM", "Answer", "Choice", "PromptTokenLogprobs"]

logger = logging.getLogger(__name__)


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
        persistent_step: bool = False,
        num_threads: int | None = None,
        cpu_isa: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
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
                persistent_step=persistent_step,
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> list[Answer]:
        """Return one answer a conversation, in order, as the model's chat template puts them.

        messages              of one conversation, or of several: mappings with role and content,
                              a text or text parts, and calls and their results, as chat
                              completions have them
        tools, tool_choice, parallel_tool_calls, response_format  of all conversations, as chat
                              completions have them
        chat_template_kwargs  enable_thinking, thinking, reasoning_effort
        on_progress           as generate()'s

        Raises  InvalidRequestError before anything runs, also where there is no chat template;
                RequestFailedError; EngineUnavailableError after close()
        """
        _check_list("messages", messages, "a list of messages, or of such lists")
        _check_mapping("chat_template_kwargs", chat_template_kwargs)
        _check_mapping("response_format", response_format)
        _check_tools(tools)
        use = tool_use_of(tools, tool_choice, parallel_tool_calls)
        is_one = all(isinstance(message, Mapping) for message in messages)
        conversations: Sequence[Any] = [messages] if is_one else messages
        prompts = [
            self._codec.encode_chat(
                _template_input(conversation),
                tools=template_tools(tools, use),
                kwargs=chat_template_kwargs,
                max_tokens=self.info.max_model_len,
            )
            for conversation in conversations
        ]
        options = AnswerOptions(tools=use)
        return self._answer(
            prompts, sampling_params, "messages", on_progress, options, response_format
        )

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
        options: AnswerOptions | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> list[Answer]:
        """Return the prompts' answers; without options all of them is text."""
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
        compiled: dict[GrammarSource, str] = {}
        pending = []
        for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            outputs = outputs_of(response_format, params.structured_outputs)
            source = None if outputs is None else outputs.source()
            grammar = None if source is None else self._compiled(source, compiled)
            plan = None
            if options is not None:
                plan = plan_answer(options, self._codec, prompt, source)
                if plan.grammar is not None and plan.grammar is not source:
                    grammar = self._compiled(plan.grammar, compiled)
            submits = plan_choices(
                params,
                self.info,
                [prompt],
                request_id=f"{name}-{number}",
                seed=seed_of(params),
                grammar=grammar,
                prompt_param=param,
            )
            pending.append([PendingChoice(one, self._codec, params, plan) for one in submits])
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

    def _compiled(self, source: GrammarSource, known: dict[GrammarSource, str]) -> str:
        """Return the grammar as the engine takes it, which has it compiled; known of the others."""
        if source in known:
            return known[source]
        grammar = written_for_matcher(source)
        if not self._core.knows_tokens:
            self._core.learn_tokens(self._codec.vocabulary.for_grammars())
        if reason := self._core.why_no_grammar(grammar):
            raise refused(source, reason)
        known[source] = grammar
        return grammar

    def _run(
        self,
        pending: dict[str, PendingChoice],
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


def _check_list(name: str, value: object, words: str) -> None:
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name} is {shorten(value)}; it must be {words}", param=name)


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping | None):
        raise InvalidRequestError(f"{name} is {shorten(value)}; it must be a mapping", param=name)


def _check_tools(tools: object) -> None:
    """Raise the error of tools that no body could have: tool_use_of checks the rest."""
    if tools is None:
        return
    _check_list("tools", tools, "a list of tools")
    try:
        json.dumps(tools)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"tools are no JSON: {error}", param="tools") from None


def _template_input(conversation: Any) -> list[dict[str, Any]]:
    """Return the messages as templates know them."""
    if not isinstance(conversation, Sequence) or not conversation:
        raise InvalidRequestError("messages has no messages; one is needed", param="messages")
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(conversation):
        at = f"messages[{index}]"
        put = dict(message) if isinstance(message, Mapping) else {}
        if calls := put.pop("tool_calls", None):
            _check_list(f"{at}.tool_calls", calls, "a list of calls")
            put["tool_calls"] = [
                _template_call(call, f"{at}.tool_calls[{number}]")
                for number, call in enumerate(calls)
            ]
        try:
            content = text_of_content(put.get("content"), put.pop("refusal", None))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{at}: {error}", param=at) from None
        put["content"] = "" if content is None and calls else content
        if not isinstance(put.get("role"), str) or put["content"] is None:
            raise InvalidRequestError(
                f"{at} is {shorten(message)}; it must be a mapping whose role is a string, and "
                "whose content is one or a list of text parts",
                param=at,
            )
        messages.append(put)
    return messages


def _template_call(call: object, at: str) -> dict[str, Any]:
    """Return a call of an earlier turn as templates know it."""
    match call:
        case {"id": str(call_id), "function": {"name": str(name), "arguments": str(arguments)}}:
            return template_call(call_id, name, arguments)
        case _:
            raise InvalidRequestError(
                f"{at} is {shorten(call)}; it must be a mapping with an id and a function, whose "
                "name and arguments are strings",
                param=at,
            )
