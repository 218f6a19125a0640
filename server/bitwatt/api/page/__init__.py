"""The page at `/`: what the models of this server save, live; and at `/docs` the API's description.

All of both is served from here.
"""

import gzip
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
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
# Swagger UI sets styles of elements in its markup, has its icons in data: addresses, and writes
# HTML that it has cleaned (DOMPurify). Scripts are our own alone, as on the page.
_DOCS_POLICY = {
    name: value for name, value in _POLICY.items() if name != "require-trusted-types-for"
} | {"style-src": "'self' 'unsafe-inline'", "img-src": "'self' data:"}
_POLICY_HEADER = "Content-Security-Policy"

router = APIRouter(include_in_schema=False)


class _File(NamedTuple):
    """What is served at a path; gzipped is the same body, where it is kept so."""

    body: bytes
    content_type: str
    tag: str
    policy: str
    gzipped: bytes | None = None


def _file(
    body: bytes,
    content_type: str,
    policy: Mapping[str, str] = _POLICY,
    *,
    gzipped: bytes | None = None,
) -> _File:
    written = "; ".join(f"{name} {value}" for name, value in policy.items())
    return _File(body, content_type, f'"{sha256(body).hexdigest()[:32]}"', written, gzipped)


@cache
def _files() -> Mapping[str, _File]:
    """Return everything that is served, by path: no path of a client's reaches the disk."""
    files = {}
    for path in sorted(_FOLDER.rglob("*")):
        body = path.read_bytes() if path.is_file() else b""
        gzipped = body if path.suffix == ".gz" else None
        name = path.relative_to(_FOLDER).as_posix().removesuffix(".gz")
        suffix = Path(name).suffix
        if suffix in _SUFFIXES:
            kind = _CONTENT_TYPES.get(suffix) or mimetypes.guess_type(name)[0]
            whole = body if gzipped is None else gzip.decompress(gzipped)
            files[f"/page/{name}"] = _file(whole, f"{kind}; charset=utf-8", gzipped=gzipped)
    files["/page/prompts.json"] = _file(msgspec.json.encode(DEFAULT_PROMPTS), "application/json")
    files["/"] = files.pop("/page/index.html")
    docs = files.pop("/page/docs/index.html")
    files["/docs"] = _file(docs.body, docs.content_type, _DOCS_POLICY)
    return files


OPEN_PATHS = tuple(_files())
"""Paths that need no key: the page holds nothing secret, and a browser can't send one for it."""


@router.get("/")
@router.get("/docs")
@router.get("/page/{name:path}")
async def get_file(request: Request) -> Response:
    """Return the page or a part of it."""
    file = _files().get(request.scope["path"])
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, _POLICY_HEADER: file.policy, "ETag": file.tag}
    body = file.body
    if file.gzipped is not None:
        headers["Vary"] = "Accept-Encoding"
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            body = file.gzipped
    known = request.headers.get("if-none-match", "")
    # A proxy that compresses makes the tag a weak one; both kinds count alike (RFC 9110, 13.1.2).
    if known == "*" or file.tag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
        headers.pop("Content-Encoding", None)
        return Response(status_code=304, headers=headers)
    return Response(body, headers={**headers, "Content-Type": file.content_type})
