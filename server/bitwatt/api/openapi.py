"""GET /openapi.json: routes and request bodies as FastAPI knows them, answers as they are sent."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from bitwatt.api.errors import AnthropicErrorBody, ErrorBody, is_anthropic
from bitwatt.api.openapi_examples import ANSWER_EXAMPLES, error_example
from bitwatt.api.routes.models import ModelCard, ModelList
from bitwatt.api.schemas.chat_events import ChatChunk, ChatCompletion
from bitwatt.api.schemas.completions import Completion
from bitwatt.api.schemas.embeddings import EmbeddingList
from bitwatt.api.schemas.message_events import AnthropicMessage, MessageEvent, TokensCount
from bitwatt.api.schemas.response_events import AnyResponseEvent, ResponseObject
from bitwatt.api.schemas.tokenize import Detokenized, Tokenized
from bitwatt.serving.state import ComparisonState

__all__ = ["describe_api"]

_Json = dict[str, Any]

_ANSWERS: Mapping[str, Any] = {
    "/v1/models": ModelList,
    "/v1/models/{name}": ModelCard,
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/responses": ResponseObject,
    "/v1/messages": AnthropicMessage,
    "/v1/messages/count_tokens": TokensCount,
    "/v1/embeddings": EmbeddingList,
    "/tokenize": Tokenized,
    "/detokenize": Detokenized,
    "/tokenizer_info": dict[str, Any],
    "/bitwatt/v1/comparison": ComparisonState,
    "/health": dict[str, str | dict[str, str]],
    "/ready": dict[str, str | dict[str, str]],
    "/version": dict[str, str],
}
_EVENTS: Mapping[str, tuple[Any, ...]] = {
    "/v1/completions": (Completion,),
    "/v1/chat/completions": (ChatChunk,),
    "/v1/responses": get_args(AnyResponseEvent),
    "/v1/messages": get_args(MessageEvent),
}
_NAMING_MODELS = ("/v1/models/{name}", "/tokenizer_info")
_WITH_PRIORITY = ("ChatBody", "CompletionBody", "EmbeddingBody", "MessagesBody", "ResponsesBody")
_PROBES = ("/health", "/ready")
_TEXT = {"text/plain": {"schema": {"type": "string"}}}

_ERRORS = {
    400: "The request is wrong; the message names the field, the value and the limit.",
    401: "A key is needed, and none of the server's was given.",
    404: "No such model is served.",
    408: "The body took too long to come.",
    413: "The body has too many bytes.",
    415: "The body is not JSON, or is compressed.",
    421: "The Host header names another server.",
    429: "The key has used what it may; Retry-After says when to come again.",
    500: "The request failed; the log tells more under the request id.",
    503: "The engine is away, or too many requests wait; Retry-After says when to come again.",
    504: "The answer took too long.",
}
_OF_MODELS = frozenset({404})
_OF_BODIES = frozenset({408, 413, 415, 429, 500, 503, 504})


def describe_api(
    app: FastAPI,
    *,
    models: Sequence[str],
    needs_key: bool,
    open_paths: Collection[str],
    allow_priority: bool,
) -> _Json:
    """Return the document of a server of these models. A key is never needed for open_paths."""
    types = [*_ANSWERS.values(), *chain(*_EVENTS.values()), ErrorBody, AnthropicErrorBody]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(str, types), schemas, strict=True))
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(path, method, schema_of, models[0])
            if path not in open_paths:
                operation["security"] = [{"key": []}] if needs_key else [{}, {"key": []}]
    described = document["components"]
    for unsent in ("HTTPValidationError", "ValidationError"):
        described["schemas"].pop(unsent, None)
    _name_models(document, models)
    if not allow_priority:
        for body in _WITH_PRIORITY:
            described["schemas"][body]["properties"]["priority"]["anyOf"][0] = {"const": 0}
    described["schemas"] |= components
    described["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _name_models(document: _Json, models: Sequence[str]) -> None:
    """Say which models there are, wherever one is to be named."""
    for body in document["components"]["schemas"].values():
        if "model" in body["properties"]:
            is_required = "model" in body.get("required", ())
            body["properties"]["model"]["enum"] = models if is_required else [*models, None]
            body["example"] = body["example"] | {"model": models[0]}
    for path in _NAMING_MODELS:
        [name] = document["paths"][path]["get"]["parameters"]
        name["schema"] = {"type": "string", "enum": models}


def _responses(path: str, method: str, schema_of: Mapping[str, _Json], model: str) -> _Json:
    """Return every answer that the route gives, by status."""

    def json(kind: Any, example: Any = None) -> _Json:
        media = {"schema": schema_of[str(kind)]}
        return {"application/json": media if example is None else media | {"example": example}}

    error_body = AnthropicErrorBody if is_anthropic(path) else ErrorBody
    content: _Json = dict(_TEXT)
    if path in _ANSWERS:
        content = json(_ANSWERS[path], _of_model(ANSWER_EXAMPLES.get(path), model))
    if path in _EVENTS:
        events = [schema_of[str(kind)] for kind in (*_EVENTS[path], error_body)]
        content["text/event-stream"] = {"schema": _event({"anyOf": events})}
    responses: _Json = {"200": {"description": "The answer.", "content": content}}
    if path in _PROBES:
        away = json(_ANSWERS[path], {"status": "error", "models": {model: "down"}})
        responses["503"] = {"description": "Not all is well.", "content": away}
    for status, meaning in _ERRORS.items():
        if status in _OF_BODIES and method != "post":
            continue
        if status in _OF_MODELS and method != "post" and path not in _NAMING_MODELS:
            continue
        body = json(error_body, error_example(status, path))
        if status == 503 and is_anthropic(path):
            status = 529
        responses[str(status)] = {"description": meaning, "content": body}
    responses["default"] = {"description": "Another error.", "content": json(error_body)}
    return responses


def _of_model(example: Any, model: str) -> Any:
    """Return the example as one of a model that is served."""
    match example:
        case dict():
            return {key: _of_model(value, model) for key, value in example.items()}
        case list():
            return [_of_model(value, model) for value in example]
        case "builtin":
            return model
    return example


def _event(data: _Json) -> _Json:
    """Return the schema of a server-sent event, as OpenAPI describes one by its fields.

    data  schema of its JSON
    """
    return {
        "type": "object",
        "description": "Its data is JSON; completions end in `[DONE]`, unless they failed.",
        "required": ["data"],
        "properties": {
            "data": {
                "anyOf": [
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": data,
                    },
                    {"const": "[DONE]"},
                ]
            }
        },
    }
