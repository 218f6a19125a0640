"""The routes that take a body, as the application has them, and a right request of each."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from bitwatt.api import routes
from bitwatt.api.schemas.common import Body
from fastapi.routing import APIRoute

__all__ = ["BODY_TYPES", "REQUESTS"]

_SAID = [{"role": "user", "content": "a"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": _SAID},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": _SAID, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": _SAID},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"messages": _SAID},
    "/detokenize": {"tokens": [5]},
}
"""A request of each, but for its model."""


def _body_types() -> dict[str, type[Body]]:
    modules = [import_module(f"{routes.__name__}.{m.name}") for m in iter_modules(routes.__path__)]
    found = [route for module in modules for route in module.router.routes]
    return {
        route.path: route.body_field.field_info.annotation
        for route in found
        if isinstance(route, APIRoute) and route.body_field
    }


BODY_TYPES = _body_types()
"""What each takes."""

assert BODY_TYPES.keys() == REQUESTS.keys(), "a right request of each route with a body"
