"""Turns what a caller asks into what an engine is sent, checked against the model's limits."""

from collections.abc import Collection, Sequence
from secrets import randbits

from bitwatt.engine.messages import EngineInfo, Submit
from bitwatt.errors import InvalidRequestError
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.serving.sampling_params import MAX_PROMPT_LOGPROBS_IN_ALL, SamplingParams

__all__ = ["plan_choices", "plan_embeddings", "seed_of"]

_SEED_BITS = 63
_LOWEST_TEMPERATURE = 1e-5  # dividing by less takes logits beyond float32


def seed_of(params: SamplingParams) -> int:
    """Return the seed that was given, or a new one each time."""
    return randbits(_SEED_BITS) if params.seed is None else params.seed


def plan_choices(
    params: SamplingParams,
    info: EngineInfo,
    prompts: Sequence[list[int]],
    *,
    request_id: str,
    seed: int,
    default_max_tokens: int | None = None,
    key_salt: str = "",
    grammar: str | None = None,
    prompt_param: str = "prompt",
    max_tokens_param: str = "max_tokens",
) -> list[Submit]:
    """Return one Submit a choice: params.n to each prompt, prompt after prompt.

    Of a prompt's choices the first alone has its log-probabilities.

    request_id          begins each choice's own
    seed                of each prompt's first choice, as seed_of gives it; choice i has seed + i
    default_max_tokens  where params.max_tokens is None: so many tokens, or as many as the context
                        has room for; None for all that it has room for
    grammar             params.structured_outputs, as constraints.compiling writes it
    key_salt            keeps the prefix cache of the caller's API key apart; "" shares it
    prompt_param, max_tokens_param  the fields that errors name

    Raises  InvalidRequestError
    """
    _check_token_ids(params.stop_token_ids or (), info, "stop_token_ids")
    _check_token_ids(params.logit_bias or (), info, "logit_bias")
    _check_num_logprobs(params, prompts, prompt_param)
    submits: list[Submit] = []
    for prompt in prompts:
        _check_prompt(prompt, info, params.max_tokens, prompt_param, max_tokens_param)
        room = info.max_model_len - len(prompt)
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = min(default_max_tokens or room, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}; the answer has at most {max_tokens} "
                f"({max_tokens_param})",
                param="min_tokens",
            )
        submits += [
            Submit(
                request_id=f"{request_id}-{len(submits) + choice}",
                prompt_token_ids=prompt,
                sampling=_resolve(params, info, max_tokens, seed, choice, grammar),
                priority=params.priority,
                cache_salt=f"{key_salt}{params.cache_salt}",
            )
            for choice in range(params.n)
        ]
    return submits


def plan_embeddings(
    info: EngineInfo,
    prompts: Sequence[list[int]],
    *,
    request_id: str,
    cache_salt: str = "",
    priority: int = 0,
    prompt_param: str = "input",
) -> list[Submit]:
    """Return one Submit a prompt, which embeds it.

    request_id    begins each prompt's own
    prompt_param  the field that errors name

    Raises  InvalidRequestError
    """
    for index, prompt in enumerate(prompts):
        param = prompt_param if len(prompts) == 1 else f"{prompt_param}[{index}]"
        _check_prompt(prompt, info, 0, param, param)
    return [
        Submit(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=prompt,
            sampling=ResolvedSampling(max_tokens=0, embeds=True),
            priority=priority,
            cache_salt=cache_salt,
        )
        for index, prompt in enumerate(prompts)
    ]


def _resolve(
    params: SamplingParams,
    info: EngineInfo,
    max_tokens: int,
    seed: int,
    choice: int,
    grammar: str | None,
) -> ResolvedSampling:
    eos = () if params.ignore_eos else info.eos_token_ids
    is_greedy = params.temperature < _LOWEST_TEMPERATURE
    return ResolvedSampling(
        max_tokens=max_tokens,
        temperature=0.0 if is_greedy else float(params.temperature),
        top_k=max(params.top_k, 0),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias={token: float(bias) for token, bias in (params.logit_bias or {}).items()},
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs if choice == 0 else None,
        seed=(seed + choice) % 2**_SEED_BITS,
        stop_token_ids=tuple(dict.fromkeys([*eos, *(params.stop_token_ids or ())])),
        min_tokens=params.min_tokens,
        grammar=grammar,
    )


def _check_prompt(
    prompt: list[int], info: EngineInfo, max_tokens: int | None, param: str, max_tokens_param: str
) -> None:
    if not prompt:
        raise InvalidRequestError("prompt has no tokens; at least one is needed", param=param)
    limit = info.max_model_len
    if len(prompt) >= limit and max_tokens != 0:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} tokens; the limit is {limit}, with at least one to "
            "generate (--max-model-len)",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens == 0 and len(prompt) > limit:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} tokens; the limit is {limit} (--max-model-len)",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None and len(prompt) + max_tokens > limit:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} tokens and {max_tokens_param} is {max_tokens}, together "
            f"{len(prompt) + max_tokens}; the limit is {limit} (--max-model-len)",
            param=max_tokens_param,
            code="context_length_exceeded",
        )
    _check_token_ids(prompt, info, param)


def _check_num_logprobs(params: SamplingParams, prompts: Sequence[list[int]], param: str) -> None:
    if params.prompt_logprobs is None:
        return
    num_tokens = sum(map(len, prompts)) * params.n
    count = num_tokens * (1 + params.prompt_logprobs)
    if count > MAX_PROMPT_LOGPROBS_IN_ALL:
        raise InvalidRequestError(
            f"{num_tokens} tokens of prompts, each with {params.prompt_logprobs} more, ask for "
            f"{count} log-probabilities; the limit is {MAX_PROMPT_LOGPROBS_IN_ALL}",
            param=param,
        )


def _check_token_ids(token_ids: Collection[int], info: EngineInfo, param: str) -> None:
    highest = max(token_ids, default=0)
    if highest >= info.vocab_size:
        raise InvalidRequestError(
            f"{param} has token id {highest}; the model has {info.vocab_size} tokens", param=param
        )
