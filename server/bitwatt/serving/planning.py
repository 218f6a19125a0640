"""Turns a request into what the engine is asked for, checked against the model's limits."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from secrets import randbits

from bitwatt.api.schemas.common import GenerationBody
from bitwatt.engine.messages import EngineInfo, Submit
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.generation import Generation
from bitwatt.serving.models import ServedModel

__all__ = ["plan_generation"]

_SEEDS = 2**63


def plan_generation(
    body: GenerationBody,
    model: ServedModel,
    info: EngineInfo,
    prompts: Sequence[list[int]],
    *,
    response_id: str,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    logprobs: int | None,
    key_salt: str = "",
    prompt_param: str = "prompt",
) -> Generation:
    """Return the request's choices, checked against the model's limits.

    max_tokens          what the caller asked for; None leaves it to the default
    default_max_tokens  given where the context leaves as much; None for all that it leaves
    logprobs            how many top log-probabilities a token, None for none
    key_salt            keeps the prefix cache of the caller's key apart; "" shares it
    prompt_param        the field the prompts come from, for errors to name

    Raises  InvalidRequestError
    """
    for prompt in prompts:
        _check_prompt(prompt, info, max_tokens, prompt_param)
    for field_name, token_ids in (
        ("stop_token_ids", body.stop_token_ids or ()),
        ("logit_bias", body.logit_bias),
    ):
        _check_token_ids(token_ids, info, field_name)
    seed = randbits(63) if body.seed is None else body.seed
    num_choices = body.n or 1
    submits: list[Submit] = []
    for prompt in prompts:
        most = max_tokens
        if most is None:
            room = info.max_model_len - len(prompt)
            most = room if default_max_tokens is None else min(default_max_tokens, room)
        if (body.min_tokens or 0) > most:
            raise InvalidRequestError(
                f"min_tokens is {body.min_tokens}; the answer has at most {most} (max_tokens)",
                param="min_tokens",
            )
        sampling = body.sampling(
            max_tokens=most,
            seed=0,
            logprobs=logprobs,
            eos_token_ids=info.eos_token_ids,
        )
        submits += [
            Submit(
                request_id=f"{response_id}-{len(submits) + choice}",
                prompt_token_ids=prompt,
                sampling=replace(sampling, seed=(seed + choice) % _SEEDS),
                priority=body.priority or 0,
                cache_salt=f"{key_salt}{body.cache_salt or ''}",
            )
            for choice in range(num_choices)
        ]
    return Generation(model=model, submits=submits, stops=body.stop, num_choices=num_choices)


def _check_prompt(prompt: list[int], info: EngineInfo, max_tokens: int | None, param: str) -> None:
    if not prompt:
        raise InvalidRequestError("prompt has no tokens; at least one is needed", param=param)
    limit = info.max_model_len
    if len(prompt) >= limit:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} tokens; the limit is {limit}, with at least one to "
            "generate (--max-model-len)",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None and len(prompt) + max_tokens > limit:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} tokens and max_tokens is {max_tokens}, together "
            f"{len(prompt) + max_tokens}; the limit is {limit} (--max-model-len)",
            param="max_tokens",
            code="context_length_exceeded",
        )
    _check_token_ids(prompt, info, param)


def _check_token_ids(token_ids: Collection[int], info: EngineInfo, param: str) -> None:
    highest = max(token_ids, default=0)
    if highest >= info.vocab_size:
        raise InvalidRequestError(
            f"{param} has token id {highest}; the model has {info.vocab_size} tokens", param=param
        )
