"""Addresses as settings are given them: of servers, of their own names, and of pages' origins."""

import re
from collections.abc import Iterable
from ipaddress import IPv6Address
from urllib.parse import urlsplit

__all__ = ["checked_hosts", "checked_origins", "checked_url"]

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# As a browser writes one. Apps have schemes of their own, and a page from a file has null.
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")


def checked_url(url: str) -> str:
    """Return the address of a server, as http://localhost:8000.

    Raises  ValueError where it is none
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("begins with http:// or https://")
    try:
        parts = urlsplit(url)
        is_host_named = bool(parts.hostname)
        _ = parts.port  # raises where it is none
    except ValueError as error:
        raise ValueError(f"is no address: {error}") from error
    if not is_host_named:
        raise ValueError("names no host")
    if re.search(r"\s", url):
        raise ValueError("is no address: it has a space")
    return url


def checked_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Return a server's names as a Host header has them, without ports: IPv6 in brackets.

    hosts  in lower case; * alone is any name

    Raises  ValueError where one is none
    """
    return tuple(map(_checked_host, hosts))


def _checked_host(host: str) -> str:
    if host == "*" or _NAME.fullmatch(host):
        return host
    try:
        return f"[{IPv6Address(host.removeprefix('[').removesuffix(']'))}]"
    except ValueError:
        raise ValueError(
            f"{host!r} is no name of a host: write it without a scheme, a port, a path or a *, as "
            "bitwatt.example.com, 10.0.0.1 or [::1]"
        ) from None


def checked_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Return origins as a browser names them: a scheme, a host, and a port if it isn't the usual.

    origins  in lower case; * alone is any origin

    Raises  ValueError where one is none
    """
    return tuple(map(_checked_origin, origins))


def _checked_origin(origin: str) -> str:
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{origin!r} is no origin: write scheme://host or scheme://host:port, without a path "
            "or a *, as https://example.com or http://localhost:3000"
        )
    for scheme, port in (("http://", ":80"), ("https://", ":443")):
        if origin.startswith(scheme):
            return origin.removesuffix(port)  # browsers leave the usual one out
    return origin
