"""Plain responses."""

import msgspec
from starlette.responses import Response

__all__ = ["json_response"]


def json_response(data: object, status: int = 200) -> Response:
    """Return the struct, or plain data, as JSON."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")
