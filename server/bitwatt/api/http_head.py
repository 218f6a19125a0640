"""What a request's head says: RFC 9110, and RFC 9112, 3 and 6.

Where two readers of a head could take it for different requests, it is refused.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote

from bitwatt.api.middleware import HttpFault

__all__ = ["Head", "read_head"]

Fields = list[tuple[bytes, bytes]]

_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[\w.:]+\])(:\d*)?")  # RFC 3986, 3.2.2
_ABSOLUTE = re.compile(rb"https?://([^/?]*)", re.IGNORECASE)


class Head(NamedTuple):
    """A head that can be served.

    path     percent-decoded, as of ASGI
    headers  names in lower case; Host is the target's, where that has one
    """

    path: str
    raw_path: bytes
    query: bytes
    headers: Fields

    def values_of(self, name: bytes) -> list[bytes]:
        """Return what the headers of this name say, in lower case."""
        return _values_of(name, self.headers)


def read_head(method: str, target: bytes, version: str, headers: Fields) -> Head | HttpFault:
    """Return what the head says, or why it is refused."""
    if method == "CONNECT":
        return HttpFault(501, "this is no proxy: CONNECT is not served")
    if version not in ("1.0", "1.1"):
        return HttpFault(505, "HTTP/1.1 and HTTP/1.0 are served")
    hosts = _values_of(b"host", headers)
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        return HttpFault(400, f"a request has one Host header, not {len(hosts)}")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return HttpFault(400, "the Host header names no host")
    if codings := _values_of(b"transfer-encoding", headers):
        if version == "1.0":
            return HttpFault(400, "HTTP/1.0 has no Transfer-Encoding")
        if fault := _fault_of_codings(codings):
            return fault
    if target == b"*" and method == "OPTIONS":
        message = "the server as a whole does not take OPTIONS"
        return HttpFault(405, message, {"Allow": "GET, HEAD, POST"})
    if absolute := _ABSOLUTE.match(target):
        host = absolute[1]
        if not host or not _HOST.fullmatch(host):
            return HttpFault(400, "the request's target names no host")
        headers = [(b"host", host), *(header for header in headers if header[0] != b"host")]
        target = target[absolute.end() :]
    raw_path, _, query = target.partition(b"?")
    if absolute and not raw_path:
        raw_path = b"/"
    if not raw_path.startswith(b"/") or b"#" in target or not raw_path.isascii():
        return HttpFault(400, "the request's target is no path")
    path = raw_path.decode("ascii")
    return Head(unquote(path) if "%" in path else path, raw_path, query, headers)


def _fault_of_codings(values: list[bytes]) -> HttpFault | None:
    """Return why the body can't be read, where it can't: RFC 9112, 6.1 and 6.3."""
    if values == [b"chunked"]:
        return None
    *before, last = (coding.strip() for value in values for coding in value.split(b","))
    if last != b"chunked" or b"chunked" in before:
        return HttpFault(400, "Transfer-Encoding ends in chunked, or the body's end is not known")
    return HttpFault(501, "a body is read as it is, or in Transfer-Encoding: chunked")


def _values_of(name: bytes, headers: Fields) -> list[bytes]:
    return [value.lower() for key, value in headers if key == name]
