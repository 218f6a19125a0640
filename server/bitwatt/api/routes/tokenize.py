"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from fastapi import APIRouter, Request, Response

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import Models, SettingsOf, name_ignored_fields
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.schemas.tokenize import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from bitwatt.errors import InvalidRequestError

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize")
async def tokenize(
    body: TokenizeBody, request: Request, models: Models, settings: SettingsOf
) -> Response:
    """Return the tokens of a text, or of a conversation as the model's template puts it."""
    headers = name_ignored_fields(request, body)
    model = models.find(body.model)
    tools = body.template_tools()
    async with tied_to_client(request.receive, timeout_s=settings.request_timeout):
        if body.prompt is not None:
            token_ids = await model.text.encode(
                body.prompt, add_special_tokens=body.add_special_tokens is not False
            )
        else:
            token_ids = await model.text.encode_chat(
                [message.as_template_input() for message in body.messages or []],
                tools=tools,
                kwargs=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final_message=bool(body.continue_final_message),
                add_special_tokens=bool(body.add_special_tokens),
            )
    info = model.engine.info
    spell = model.text.vocabulary.spell
    return json_response(
        Tokenized(
            count=len(token_ids),
            max_model_len=None if info is None else info.max_model_len,
            tokens=token_ids,
            token_strs=[spell(token_id) for token_id in token_ids]
            if body.return_token_strs
            else None,
        ),
        headers=headers,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request, models: Models) -> Response:
    """Return the text of tokens, special tokens spelled out."""
    headers = name_ignored_fields(request, body)
    model = models.find(body.model)
    highest, size = max(body.tokens, default=0), len(model.text.vocabulary)
    if highest >= size:
        raise InvalidRequestError(
            f"tokens has token id {highest}; the model has {size} tokens", param="tokens"
        )
    return json_response(Detokenized(await model.text.decode(body.tokens)), headers=headers)


@router.get("/tokenizer_info")
async def tokenizer_info(models: Models, model: str | None = None) -> Response:
    """Return what the model's tokenizer_config.json says, chat template and special tokens too."""
    return Response(models.find(model).text.description, media_type="application/json")
