"""GET /openapi.json: routes and request bodies as FastAPI knows them, answers as they are sent."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from bitwatt.api.errors import ErrorBody
from bitwatt.api.routes.models import ModelCard, ModelList
from bitwatt.api.routes.state import ComparisonState
from bitwatt.api.schemas.chat import ChatChunk, ChatCompletion
from bitwatt.api.schemas.completions import Completion
from bitwatt.api.schemas.tokenize import Detokenized, Tokenized

__all__ = ["describe_api"]

_Json = dict[str, Any]

_ANSWERS: Mapping[str, Any] = {
    "/v1/models": ModelList,
    "/v1/models/{name}": ModelCard,
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/tokenize": Tokenized,
    "/detokenize": Detokenized,
    "/bitwatt/v1/comparison": ComparisonState,
    "/health": dict[str, str | dict[str, str]],
    "/ready": dict[str, str | dict[str, str]],
    "/version": dict[str, str],
}
_EVENTS: Mapping[str, Any] = {"/v1/completions": Completion, "/v1/chat/completions": ChatChunk}
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
    500: "The request failed; the log tells more under the request id.",
    503: "The engine is away, or too many requests wait; Retry-After says when to come again.",
    504: "The answer took too long.",
}
_OF_MODELS = frozenset({404})
_OF_BODIES = frozenset({408, 413, 415, 500, 503, 504})


def describe_api(app: FastAPI, *, open_paths: Collection[str]) -> _Json:
    """Return the document. A key is needed but for open_paths, where the server has keys."""
    types = [*_ANSWERS.values(), *_EVENTS.values(), ErrorBody]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(str, types), schemas, strict=True))
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(path, method, schema_of)
            if path not in open_paths:
                operation["security"] = [{}, {"key": []}]
    described = document["components"]
    for unsent in ("HTTPValidationError", "ValidationError"):
        described["schemas"].pop(unsent, None)
    described["schemas"] |= components
    described["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _responses(path: str, method: str, schema_of: Mapping[str, _Json]) -> _Json:
    """Return every answer that the route gives, by status."""

    def json(kind: Any) -> _Json:
        return {"application/json": {"schema": schema_of[str(kind)]}}

    content = json(_ANSWERS[path]) if path in _ANSWERS else dict(_TEXT)
    if path in _EVENTS:
        content["text/event-stream"] = {"schema": schema_of[str(_EVENTS[path])]}
    responses: _Json = {"200": {"description": "The answer.", "content": content}}
    if path in _PROBES:
        responses["503"] = {"description": "Not all is well.", "content": content}
    for status, meaning in _ERRORS.items():
        if status in _OF_BODIES and method != "post":
            continue
        if status in _OF_MODELS and method != "post" and "{name}" not in path:
            continue
        responses[str(status)] = {"description": meaning, "content": json(ErrorBody)}
    responses["default"] = {"description": "Another error.", "content": json(ErrorBody)}
    return responses
