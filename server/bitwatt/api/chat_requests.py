"""What a chat asks of a model, whichever API it came by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from bitwatt.api.schemas.chat import ChatBody
from bitwatt.engine.messages import EngineInfo
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.answers import AnswerOptions
from bitwatt.serving.planning import seed_of
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.twins import Posted
from bitwatt.text.processor import TextProcessor

__all__ = ["as_chat", "as_chat_body", "chat_prompt", "chat_request", "refusing_in"]

_PATH = "/v1/chat/completions"


def chat_request(body: ChatBody, *, request_id: str, key_salt: str) -> GenerationRequest:
    """Return what the body asks. Raises InvalidRequestError beyond a limit."""

    use = body.tool_use()
    continued = body.messages[-1].content if body.continue_final_message else None
    budget = body.thinking_token_budget

    async def encode(text: TextProcessor, info: EngineInfo) -> list[list[int]]:
        return [await chat_prompt(body, text, max_tokens=info.max_model_len)]

    params = body.sampling_params()
    return GenerationRequest(
        request_id=request_id,
        params=params,
        seed=seed_of(params),
        encode=encode,
        silent=body.silent,
        key_salt=key_salt,
        prompt_param="messages",
        max_tokens_param=body.max_tokens_param,
        answer=AnswerOptions(
            tools=use,
            thinking_budget=None if budget == -1 else budget,
            continued=continued,
        ),
    )


async def chat_prompt(
    body: ChatBody, text: TextProcessor, *, max_tokens: int | None = None
) -> list[int]:
    """Return the tokens of the prompt, as the model's template puts it.

    Raises  InvalidRequestError, also where it has more than max_tokens
    """
    return await text.encode_chat(
        [message.as_template_input() for message in body.messages],
        tools=body.template_tools(body.tool_use()),
        kwargs=body.told_to_template,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        max_tokens=max_tokens,
    )


def as_chat_body(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatBody:
    """Return the chat body that another API's request comes to.

    names  the other API's name of a field, where it has one of its own: errors have it. A name
           that begins with a dot is of a field within another

    Raises  RequestValidationError
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        faults = error.errors()
        for fault in faults:
            first, *rest = fault["loc"] or (None,)
            if first is not None:
                fault["loc"] = ("body", names.get(str(first), first), *rest)
            else:
                fault["loc"] = ("body",)
        raise RequestValidationError(faults) from None


def as_chat(
    fields: Mapping[str, Any], names: Mapping[str, str], *, request_id: str, key_salt: str
) -> tuple[GenerationRequest, Posted]:
    """Return what another API's request asks, and the same for a server that knows chat alone.

    fields, names  as as_chat_body has them

    Raises  InvalidRequestError and RequestValidationError, in the other API's names
    """
    body = as_chat_body(fields, names)
    with refusing_in(names):
        asked = chat_request(body, request_id=request_id, key_salt=key_salt)
    outputs = asked.params.structured_outputs
    if outputs is not None:
        outputs = replace(outputs, param=names.get(outputs.param, outputs.param))
    asked = replace(
        asked,
        params=replace(asked.params, structured_outputs=outputs),
        prompt_param=names.get("messages", "messages"),
        max_tokens_param=names["max_completion_tokens"],
    )
    return asked, Posted(_PATH, msgspec.json.encode(body.model_dump(exclude_none=True)))


@contextmanager
def refusing_in(names: Mapping[str, str]) -> Iterator[None]:
    """Have an InvalidRequestError of the block name the other API's field.

    names  as as_chat_body has them
    """
    try:
        yield
    except InvalidRequestError as error:
        if error.param is None:
            raise
        name = _renamed(error.param, names)
        message = str(error).replace(error.param, name)
        raise InvalidRequestError(message, param=name, code=error.code) from None


def _renamed(param: str, names: Mapping[str, str]) -> str:
    """Return the other API's name of a field of chat's, as `tools[0].name`."""
    if param in names:
        return names[param]
    for ours, others in names.items():
        if ours.startswith("."):
            param = param.replace(ours, others)
    return param
