"""The page at `/`: what the models of this server save, live. All of it is served from here."""

import mimetypes
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec
from bitwatt_client.prompts import DEFAULT_PROMPTS
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

__all__ = ["OPEN_PATHS", "router"]

_FOLDER = Path(__file__).parent
_SUFFIXES = (".html", ".css", ".js", ".svg")
_CONTENT_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}

router = APIRouter(include_in_schema=False)


class _File(NamedTuple):
    body: bytes
    content_type: str
    tag: str


def _file(body: bytes, content_type: str) -> _File:
    return _File(body, content_type, f'"{sha256(body).hexdigest()[:32]}"')


@cache
def _files() -> Mapping[str, _File]:
    """Return everything that is served, by path: no path of a client's reaches the disk."""
    files = {}
    for path in sorted(_FOLDER.rglob("*")):
        if path.suffix in _SUFFIXES:
            kind = _CONTENT_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
            name = f"/page/{path.relative_to(_FOLDER).as_posix()}"
            files[name] = _file(path.read_bytes(), f"{kind}; charset=utf-8")
    files["/page/prompts.json"] = _file(msgspec.json.encode(DEFAULT_PROMPTS), "application/json")
    files["/"] = files.pop("/page/index.html")
    return files


OPEN_PATHS = tuple(_files())
"""Paths that need no key: the page holds nothing secret, and a browser can't send one for it."""


@router.get("/")
@router.get("/page/{name:path}")
async def get_file(request: Request) -> Response:
    """Return the page or a part of it."""
    file = _files().get(request.scope["path"])
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "ETag": file.tag}
    known = request.headers.get("if-none-match", "")
    # A proxy that compresses makes the tag a weak one; both kinds count alike (RFC 9110, 13.1.2).
    if known == "*" or file.tag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "Content-Type": file.content_type})
