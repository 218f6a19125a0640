"""A caller's request, whichever model is to answer it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from bitwatt.engine.messages import EngineInfo
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.answers import AnswerOptions, plan_answer
from bitwatt.serving.generation import Generation
from bitwatt.serving.models import ServedModel
from bitwatt.serving.planning import plan_choices
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.text.processor import TextProcessor

__all__ = ["Encode", "GenerationRequest"]

Encode = Callable[[TextProcessor, EngineInfo], Awaitable[list[list[int]]]]
"""Returns the token ids of each prompt, by a model's own tokenizer and template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What is asked. The twin that a request is mirrored to is asked the same, by the same seed.

    silent  names of params' fields that the caller left to the model's own defaults
    encode  makes the prompts, which differ with the model's vocabulary
    answer  how each answer is read, and what it must be; None takes it as it is
    lists_stop_tokens  as Generation has it
    has_id_prompts     whether prompts are token ids as the caller sent them, of one vocabulary
    others  as planning.plan_choices has them
    """

    request_id: str
    params: SamplingParams
    seed: int
    encode: Encode
    silent: frozenset[str] = frozenset()
    default_max_tokens: int | None = None
    key_salt: str = ""
    prompt_param: str = "prompt"
    max_tokens_param: str = "max_tokens"
    lists_stop_tokens: bool = False
    has_id_prompts: bool = False
    answer: AnswerOptions | None = None

    @property
    def has_token_ids(self) -> bool:
        """Whether it says by token ids what another vocabulary would read otherwise."""
        params = self.params
        return self.has_id_prompts or bool(params.stop_token_ids or params.logit_bias)

    def settled_for(self, model: ServedModel) -> "GenerationRequest":
        """Return the same with the model's own defaults where the caller said nothing."""
        defaults: dict[str, Any] = {
            name: value for name, value in model.sampling_defaults.items() if name in self.silent
        }
        return replace(self, params=replace(self.params, **defaults), silent=frozenset())

    async def for_model(self, model: ServedModel) -> Generation:
        """Return the choices that the model is to generate.

        Raises  EngineUnavailableError, InvalidRequestError
        """
        params = self.settled_for(model).params
        info = model.require_info()
        asked = self.params.structured_outputs
        source = None if asked is None else asked.source()
        grammar = None if source is None else await model.grammars.check(source)
        prompts = await self.encode(model.text, info)
        num_choices = len(prompts) * self.params.n
        if num_choices > model.engine.capacity:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with n = {self.params.n} ask for {num_choices} choices; "
                f"{model.engine.capacity} may run and wait at once (--max-num-seqs, --max-queue)",
                param=self.prompt_param if self.params.n == 1 else "n",
            )
        answers = None
        if self.answer is not None:
            codec = model.text.codec
            answers = [plan_answer(self.answer, codec, prompt, source) for prompt in prompts]
            # Prompts of one request begin their answers alike: a chat has one.
            if answers[0].grammar is not None and answers[0].grammar is not source:
                grammar = await model.grammars.check(answers[0].grammar)
        submits = plan_choices(
            params,
            info,
            prompts,
            request_id=self.request_id,
            seed=self.seed,
            default_max_tokens=self.default_max_tokens,
            key_salt=self.key_salt,
            grammar=grammar,
            prompt_param=self.prompt_param,
            max_tokens_param=self.max_tokens_param,
        )
        return Generation(
            model=model,
            submits=submits,
            stops=self.params.stop_strings,
            num_choices=self.params.n,
            lists_stop_tokens=self.lists_stop_tokens,
            answers=answers,
        )
